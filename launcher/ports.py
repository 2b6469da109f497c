"""Where the processes of several machines meet. One machine takes a port that is free (accelerate looks for it)."""

import hashlib
import socket
from collections.abc import Mapping

import psutil

LOWEST, HIGHEST = 20000, 32000
# What a cluster calls the job, the same on all of its machines.
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "JOB_NAME")


def meeting_port(run: str, environment: Mapping[str, str]) -> int:
    """A port below the ephemeral ones that all machines of a training work out alike, and others hardly ever.

    The machines cannot ask each other for a free port before they have met. MASTER_PORT says otherwise.
    """
    job = next((environment[name] for name in JOB_VARIABLES if environment.get(name)), "")
    digest = hashlib.sha256(f"{job} {run}".encode()).digest()
    return LOWEST + int.from_bytes(digest[:4]) % (HIGHEST - LOWEST)


def interface_towards(address: str, port: int) -> str | None:
    """The network interface from which a machine is reached; None where there is no telling.

    gloo otherwise takes the one that the machine's own name resolves to, which is often the loopback.
    """
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)  # sends nothing: the kernel only looks up the route
            here = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == here for entry in addresses):
            return name
    return None
