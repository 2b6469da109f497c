"""Benchmarks: speed and memory, never in the tests."""
