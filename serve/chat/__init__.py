"""The terminal client of `make chat`."""
