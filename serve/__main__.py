"""`python -m serve COMMAND [NAME=value ...]`: serve runs, talk to them, look after the daemon.

daemon    serve in the foreground             status    what a daemon is doing
chat      talk to a daemon                    load      give it one more run, `unload` takes one away
infer     both at once, both gone at /quit    stop      end it when its open requests are answered
keys      make the key pairs for tcp
"""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve import arguments as words
from serve.arguments import Arguments
from serve.chat import flags
from serve.errors import EXIT_CANCELLED, EXIT_DONE, RequestError, ServeError, UserError, nearest, report

if TYPE_CHECKING:
    import subprocess

    from serve.client import Client, ShowProgress
    from serve.runtime import Record

    Daemon = subprocess.Popen[bytes]


def main(args: list[str]) -> int:
    """Run one command; returns the exit code, raises `ServeError` for what the user should read."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(__doc__)
        return EXIT_DONE
    command, *rest = args
    if command not in words.NAMES:
        raise UserError(f"{command}: unknown command; {nearest(command, words.NAMES)} Try: python -m serve chat")
    if "-h" in rest or "--help" in rest:
        print(flags.help_text(command, words.NAMES[command]) if command in flags.COMMANDS else __doc__)
        return EXIT_DONE
    parsed = words.parse(command, rest)
    if command == "daemon":
        return _daemon(words.require_finished(parsed))
    if command == "chat":
        return _chat(parsed)
    if command == "infer":
        return _infer(words.require_finished(parsed))
    if command == "keys":
        from serve import keys

        print(keys.make())
        return EXIT_DONE
    from serve import manage

    return asyncio.run(manage.run(command, parsed))


def _daemon(arguments: Arguments) -> int:
    from serve import daemon, runtime, starter

    starter.require_unserved(runtime.directory(), arguments)
    return daemon.main(arguments)


def _chat(arguments: Arguments) -> int:
    from serve import curve, runtime, starter

    attached = _attached(arguments)
    folder = runtime.directory()
    process = None
    if arguments.connect:
        record: Record | None = curve.remote(arguments.connect)
    elif arguments.start:
        record = starter.find(folder, arguments)
    else:
        record = starter.find_or_fail(folder, arguments)
    if record is None:
        arguments = words.require_finished(arguments)
        process = starter.start(folder, arguments, is_child=False)
    return _talk(folder, arguments, attached, record, process)


def _infer(arguments: Arguments) -> int:
    from serve import runtime, starter

    attached = _attached(arguments)
    folder = runtime.directory()
    starter.require_unserved(folder, arguments)
    return _talk(folder, arguments, attached, None, starter.start(folder, arguments, is_child=True))


def _attached(arguments: Arguments) -> list[str]:
    """The files, read before anything is started; raises `UserError`."""
    from serve.chat import piped
    from serve.chat.files import read_file

    if arguments.is_json and not piped.is_piped():
        raise UserError(
            "--json is for pipes, and both ends are a terminal; try: echo hello | python -m serve chat --json"
        )
    return [read_file(path) for path in arguments.files]


def _talk(
    folder: Path, arguments: Arguments, attached: list[str], record: "Record | None", process: "Daemon | None"
) -> int:
    """Interactive where both ends are a terminal, one question and one answer otherwise.

    The daemon is the one of the record, or the `process` that was started and has no record yet.
    """
    from serve import starter
    from serve.chat import piped

    # Before the event loop, which would leave Ctrl-C waiting for the end of stdin.
    question = piped.read_question(attached) if piped.is_piped() else ""

    async def talk() -> int:
        found = record
        if found is None:
            assert process is not None, "neither a daemon nor one that starts"
            found = await starter.wait_until_published(folder, arguments, process)
        if not question:
            return await _converse(folder, arguments, attached, found)
        with await _connect_visibly(found, arguments) as client:
            return await piped.answer(client, question, arguments)

    return asyncio.run(talk())


async def _converse(folder: Path, arguments: Arguments, attached: list[str], record: "Record") -> int:
    from serve import starter
    from serve.chat.terminal import Terminal

    async def reconnect(show: "ShowProgress") -> "Client":
        found = record if arguments.connect else starter.find(folder, arguments)
        if found is None and arguments.start:
            started = starter.start(folder, words.require_finished(arguments), is_child=False)
            found = await starter.wait_until_published(folder, arguments, started)
        return await _connect(found or starter.find_or_fail(folder, arguments), arguments, show)

    return await Terminal(await _connect_visibly(record, arguments), reconnect, arguments, attached).run()


async def _connect_visibly(record: "Record", arguments: Arguments) -> "Client":
    """A person sees how far a daemon is with loading; a program that reads stderr does not."""
    from serve.progress import Progress

    progress = Progress(sys.stderr)
    is_seen = sys.stderr is not None and sys.stderr.isatty()
    try:
        return await _connect(record, arguments, progress.show if is_seen else lambda *_: None)
    finally:
        progress.clear()


async def _connect(record: "Record", arguments: Arguments, show: "ShowProgress") -> "Client":
    """A client of a daemon that is ready and holds its runs as was asked for."""
    from serve import starter
    from serve.client import connect

    client = await connect(record, show, starter.adapter_of(record, arguments) or None)
    _require_as_asked(client, arguments)
    return client


def _require_as_asked(client: "Client", arguments: Arguments) -> None:
    """Raise `UserError` if the daemon that runs already holds its runs in another way than was asked for."""
    for name, wanted, has in (("HOLD", arguments.hold, "hold"), ("DTYPE", arguments.dtype, "dtype")):
        held = client.info[has]
        # The echo engine has no dtype.
        if wanted not in ("auto", held) and held != "none":
            client.__exit__()
            raise UserError(f"{client.record.run} is served with {name}={held} already; try: make stop, then again")


def run() -> None:
    """Leave with the command's exit code; what the user should read is one line on stderr."""
    try:
        sys.exit(main(sys.argv[1:]))
    except ServeError as error:
        _tell_in_json(error)
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _tell_in_json(RequestError("E_CANCELLED", "cancelled", {}))
        sys.exit(EXIT_CANCELLED)


def _tell_in_json(error: ServeError) -> None:
    """For who asked for JSON: the last line of stdout says how it ended, whatever went wrong."""
    if flags.is_json(sys.argv[1:]):
        from serve.chat import piped

        piped.tell_in_json(error)


if __name__ == "__main__":
    run()
