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
from serve.errors import EXIT_CANCELLED, EXIT_DONE, ServeError, UserError, nearest

if TYPE_CHECKING:
    from serve.client import Client
    from serve.runtime import Record

STOP_SECONDS = 10.0


def main(args: list[str]) -> int:
    """Run one command; returns the exit code, raises `ServeError` for what the user should read."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(__doc__)
        return EXIT_DONE
    command, *rest = args
    if command not in words.NAMES:
        raise UserError(f"{command}: unknown command; {nearest(command, words.NAMES)} Try: python -m serve chat")
    parsed = words.parse(command, rest)
    if command == "daemon":
        return _daemon(words.require_finished(parsed))
    if command == "chat":
        return asyncio.run(_chat(parsed))
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


async def _chat(arguments: Arguments) -> int:
    from serve import curve, runtime, starter

    folder = runtime.directory()
    if arguments.connect:
        return await _talk(folder, arguments, curve.remote(arguments.connect))
    if not arguments.start:
        return await _talk(folder, arguments, starter.find_or_fail(folder, arguments))
    record = starter.find(folder, arguments)
    if record is None:
        arguments = words.require_finished(arguments)
        process = starter.start(folder, arguments, is_child=False)
        record = await starter.wait_until_published(folder, arguments, process)
    return await _talk(folder, arguments, record)


def _infer(arguments: Arguments) -> int:
    from serve import runtime, starter

    folder = runtime.directory()
    starter.require_unserved(folder, arguments)
    process = starter.start(folder, arguments, is_child=True)

    async def talk() -> int:
        return await _talk(folder, arguments, await starter.wait_until_published(folder, arguments, process))

    try:
        return asyncio.run(talk())
    finally:
        starter.end(process, STOP_SECONDS)


async def _talk(folder: Path, arguments: Arguments, record: "Record") -> int:
    """Interactive where both ends are a terminal, one prompt and one answer otherwise."""
    from serve import starter
    from serve.client import Client, connect
    from serve.progress import Progress, is_live

    progress = Progress(sys.stderr)

    async def connected(record: "Record") -> Client:
        try:
            show = progress.show if is_live(sys.stderr) else lambda *_: None
            client = await connect(record, show, starter.adapter_of(record, arguments) or None)
        finally:
            progress.clear()
        _require_as_asked(client, arguments)
        return client

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        from serve import piped

        prompt = piped.read_prompt()
        with await connected(record) as client:
            return await piped.answer(client, prompt)
    from serve.terminal import Terminal

    async def reconnect() -> Client:
        return await connected(record if arguments.connect else starter.find_or_fail(folder, arguments))

    return await Terminal(await connected(record), reconnect).run()


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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_CANCELLED)


if __name__ == "__main__":
    run()
