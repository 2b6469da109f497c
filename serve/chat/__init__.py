"""The client of `make chat`: on a terminal, or in a pipe. No torch, nothing of launcher.

Read in this order: `conversation` (what stands), `talk` and `asking` (of a daemon), `answers` and `markdown` (what becomes of a text),
`screen`, `commands`, `actions`, `terminal`.
"""
