"""Serve a finished run and talk to it: a daemon, one engine process, a terminal client. Only the engine process needs torch.

Read in this order: `protocol` (what crosses the wire), `engine` (what a model must be able to do), `slots` and `worker`
(the engine process), `broker` and `daemon` (between clients and engine), `client`, `chat`.
"""
