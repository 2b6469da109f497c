"""`python -m serve {daemon,chat,infer} [NAME=value ...]`: serve a run, talk to it, or both at once."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve import arguments as words
from serve.arguments import Arguments
from serve.errors import EXIT_CANCELLED, EXIT_DONE, ServeError, UserError, nearest

if TYPE_CHECKING:
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
        from serve import daemon

        return daemon.main(words.require_finished(parsed))
    return asyncio.run(_chat(parsed)) if command == "chat" else _infer(words.require_finished(parsed))


async def _chat(arguments: Arguments) -> int:
    from serve import runtime, starter

    folder = runtime.directory()
    if not arguments.start:
        return await _talk(folder, arguments, starter.find_or_fail(folder, arguments))
    record = starter.find(folder, arguments)
    if record is None:
        arguments = words.require_finished(arguments)
        process = starter.start(folder, arguments, is_child=False)
        record = await starter.wait_until_published(folder, arguments, process)
    elif arguments.hold not in ("auto", record.hold):
        raise UserError(f"{record.run} is served with HOLD={record.hold} already; stop that first: kill {record.pid}")
    return await _talk(folder, arguments, record)


def _infer(arguments: Arguments) -> int:
    from serve import runtime, starter

    folder = runtime.directory()
    if (record := starter.find(folder, arguments)) is not None:
        raise UserError(f"{record.run} is already served by process {record.pid}; try: make chat RUN={record.run}")
    process = starter.start(folder, arguments, is_child=True)

    async def talk() -> int:
        return await _talk(folder, arguments, await starter.wait_until_published(folder, arguments, process))

    try:
        return asyncio.run(talk())
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


async def _talk(folder: Path, arguments: Arguments, record: "Record") -> int:
    """Interactive where both ends are a terminal, one prompt and one answer otherwise."""
    from serve import starter
    from serve.client import Client, connect
    from serve.progress import Progress, is_live

    progress = Progress(sys.stderr)

    async def connected(record: "Record") -> Client:
        try:
            return await connect(record, progress.show if is_live(sys.stderr) else lambda *_: None)
        finally:
            progress.clear()

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        from serve import piped

        prompt = piped.read_prompt()
        with await connected(record) as client:
            return await piped.answer(client, prompt)
    from serve.terminal import Terminal

    async def reconnect() -> Client:
        return await connected(starter.find_or_fail(folder, arguments))

    return await Terminal(await connected(record), reconnect).run()


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
