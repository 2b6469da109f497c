"""A process that has imported the libraries of a program, computed nothing, and forks the programs that tests start.

A forked program is as real as one started by its command: it has its own pid, signals, standard streams, working directory,
environment, session and exit code, and its parent is the process that asked for it. Only the seconds of importing are gone.
Our own packages are imported anew by each program, so a fault that a test plants is there from the first line.

One thing differs: a library reads the variables of AT_IMPORT once; a program with other values of them is started by its
command.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import types
from pathlib import Path
from typing import Any

from tests.support import command

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
OURS = ("launcher", "serve", "bench", "tests")
# They start the processes of a training.
LAUNCHERS = ("accelerate.commands.launch", "torch.distributed.run")
# `light` knows no torch. Importing our modules brings the libraries that they need; transformers imports the rest when it is asked.
MODULES = {
    "light": ("serve.chat.terminal", "serve.chat.piped", "serve.daemon", "serve.engine_process", "serve.manage", "launcher.__main__"),
    "heavy": (
        "serve.daemon", "serve.slot_engine", "launcher.__main__", "launcher.loop", "launcher.evaluate", "bitsandbytes",
        *LAUNCHERS, "deepspeed.runtime.engine", "deepspeed.ops.op_builder.all_ops", "matplotlib.backends.backend_agg",
        "peft.tuners.lora.bnb", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
    ),
}  # fmt: skip
# How many threads there are decides nothing in a test, and what launchers tell is read when the processes join.
AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH_EXTENSIONS_", "TORCH_HOME", "MKL_", "ATEN_", "CUDA_", "LD_", "PYTHON")
LARGEST_REQUEST = 2**18
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_libc = ctypes.CDLL(None)


def at_import(environment: dict[str, str]) -> dict[str, str]:
    """The variables that a library or Python itself reads once, but for the search path."""
    return {k: v for k, v in environment.items() if k.startswith(AT_IMPORT) and k != "PYTHONPATH"}


class Zygote:
    """The side of who asks for programs. The process is started with the first program."""

    def __init__(self, kind: str, link: socket.socket | None = None) -> None:
        self.kind = kind
        self.environment = at_import(dict(os.environ))
        self._link = link

    def can_fork(self, argv: list[str], environment: dict[str, str]) -> bool:
        """Whether this command is a program that the zygote has the libraries of."""
        if len(argv) < 3 or argv[0] != PYTHON or at_import(environment) != self.environment:
            return False
        return argv[1] == "-c" or (argv[1] == "-m" and (argv[2] in LAUNCHERS or argv[2].split(".")[0] in OURS))

    def fork(self, fds: list[int], **request: Any) -> int:
        """Fork a program with these standard streams; its pid. It is a child of the calling process."""
        link = self._link = self._link or self._start()
        # An orphan goes to the nearest subreaper above it; the program is an orphan as soon as it is forked.
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            socket.send_fds(link, [json.dumps(request).encode()], fds)
            return int(link.recv(32))
        finally:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Threads of OpenBLAS would start with the import of numpy.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}
        process = subprocess.Popen(
            [PYTHON, "-m", "tests.support.zygote", self.kind, str(theirs.fileno())], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0,
        )  # fmt: skip
        theirs.close()
        atexit.register(process.wait)
        atexit.register(ours.close)
        assert ours.recv(32) == b"ready", "the zygote did not start"
        return ours


class WarmPopen(subprocess.Popen[Any]):
    """`subprocess.Popen` that has a zygote fork the program where it can.

    `takes_terminal`: standard input becomes the controlling terminal of a new session.
    """

    zygote = Zygote("light")

    def __init__(self, args: Any, *rest: Any, takes_terminal: bool = False, **options: Any) -> None:
        if takes_terminal:
            options |= {"start_new_session": True, "preexec_fn": _take_terminal}
        super().__init__(args, *rest, **options)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, *rest: Any) -> None:  # fmt: skip
        environment = {k: str(v) for k, v in (os.environ if env is None else env).items()}
        argv = [os.fspath(arg) for arg in args] if isinstance(args, list | tuple) else []
        is_unbuffered = argv[1:2] == ["-u"]
        if is_unbuffered:
            del argv[1]
        first = preexec_fn and f"{preexec_fn.__module__}:{preexec_fn.__qualname__}"
        is_plain = executable in (None, PYTHON) and not pass_fds and "<" not in (first or "")
        if not (is_plain and self.zygote.can_fork(argv, environment)):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, new_session, group = rest
        streams = [fd if fd != -1 else standard for standard, fd in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = self.zygote.fork(
            streams, argv=argv, environment=environment, cwd=os.fspath(cwd or Path.cwd()), new_session=bool(new_session),
            group=os.getpgrp() if group == -1 else group, is_unbuffered=is_unbuffered,
            first=first,
        )  # fmt: skip
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class HeavyPopen(WarmPopen):
    """The same for programs that import torch."""

    zygote = Zygote("heavy")


def serve(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a program for each request. Returns in each program, with what it shall be; ends with the process that asks."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _libc.prctl(_PR_SET_NAME, b"zygote")
    while True:
        data, fds, _, _ = socket.recv_fds(link, LARGEST_REQUEST, 3)
        if not data:
            os._exit(0)
        told, tell = os.pipe()
        if not (between := os.fork()):
            between = os.getpid()
            if pid := os.fork():
                os.write(tell, str(pid).encode())
                os._exit(0)
            for fd in (told, tell, link.detach()):
                os.close(fd)
            while os.getppid() == between:
                time.sleep(0.0005)
            return json.loads(data), fds
        os.waitpid(between, 0)
        link.send(os.read(told, 32))
        for fd in (told, tell, *fds):
            os.close(fd)


def keep_copy(kind: str, fds: list[int]) -> None:
    """Fork a zygote of this program's own, for the programs that it starts itself; in those this returns again."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        WarmPopen.zygote = Zygote(kind, ours)
        plain = subprocess.Popen
        for module in list(sys.modules.values()):
            if vars(module).get("Popen") is plain:
                module.Popen = WarmPopen  # type: ignore[attr-defined]
        return
    ours.close()
    for fd in fds:
        os.close(fd)
    # In the same session, so that what it forks can join the group of who asks; no key of a terminal reaches it.
    os.setpgid(0, 0)
    start(kind, *serve(theirs))


def start(kind: str, request: dict[str, Any], fds: list[int]) -> None:
    """Become the program: streams, session, signals, directory and environment as they were asked for, then its own code."""
    if request["new_session"]:
        os.setsid()
    else:
        os.setpgid(0, request["group"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    program = request["argv"][2]
    if program in ("launcher", *LAUNCHERS) or program.startswith(("serve", "tests")):
        keep_copy(kind, fds)
    for standard, fd in enumerate(fds):
        os.dup2(fd, standard)
        os.close(fd)
    if request["first"]:
        module, _, name = request["first"].partition(":")
        getattr(importlib.import_module(module), name)()
        forget_ours()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    _libc.prctl(_PR_SET_NAME, b"python")
    open_streams(request["is_unbuffered"])
    try:
        run(request["argv"])
    except SystemExit as end:
        leave(end.code)
    leave(None)


def leave(code: Any) -> None:
    """End as the interpreter does, without taking apart the libraries: that alone takes half a second of torch."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    os._exit((code or 0) & 0xFF)


def open_streams(is_unbuffered: bool) -> None:
    """`sys.stdin`, `sys.stdout` and `sys.stderr` as the interpreter makes them."""
    sys.stdin = io.TextIOWrapper(os.fdopen(0, "rb", closefd=False), encoding="utf-8")
    for name, fd, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        is_lined = fd == 2 or os.isatty(fd)
        stream = io.TextIOWrapper(
            os.fdopen(fd, "wb", closefd=False), encoding="utf-8", errors=errors, line_buffering=is_lined,
            write_through=is_unbuffered,
        )  # fmt: skip
        setattr(sys, name, stream)


def run(argv: list[str]) -> None:
    """Run `python -m MODULE …` or `python -c PROGRAM …`."""
    sys.orig_argv[:] = argv
    command.show(argv, dict(os.environ))
    base = [entry for entry in sys.path if entry not in (str(ROOT), "")]
    places = [str(Path(place).resolve()) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [*places, *base]
    importlib.invalidate_caches()
    if any(Path(place, "sitecustomize.py").is_file() for place in places):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    sys.path.insert(0, str(Path.cwd()) if argv[1] == "-m" else "")
    sys.argv = [argv[1], *argv[3:]]
    if argv[1] == "-m":
        if argv[2] in LAUNCHERS:
            # It is to be run, and not to be found.
            del sys.modules[argv[2]]
        runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(argv[2], "<string>", "exec"), sys.modules["__main__"].__dict__)


def forget_ours() -> None:
    """Take our own modules out of the interpreter."""
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]


def main(kind: str, link: socket.socket) -> None:
    """Import, say so, and fork."""
    gc.disable()
    for name in MODULES[kind]:
        importlib.import_module(name)
    if kind == "heavy":
        # transformers compiles a thousand patterns with the first model that it loads.
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")  # type: ignore[attr-defined]
    forget_ours()
    gc.collect()
    gc.freeze()
    gc.enable()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import started a thread, and a fork would lose it"
    link.send(b"ready")
    start(kind, *serve(link))


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
