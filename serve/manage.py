"""`status`, `load`, `unload` and `stop`: what the owner of a daemon asks of it from the command line."""

from pathlib import Path
from typing import Any

from serve import arguments as words
from serve import curve, runs, runtime, starter
from serve.arguments import Arguments
from serve.chat.printable import printable
from serve.client import Client, connect
from serve.engine import AdapterInfo
from serve.errors import EXIT_DONE, UserError
from serve.runtime import Record


async def run(command: str, arguments: Arguments) -> int:
    """Carry out one of the four; returns the exit code."""
    if arguments.connect:
        record = curve.remote(arguments.connect)
    else:
        record = starter.find_or_fail(runtime.directory(), arguments)
    if command in ("load", "unload") and not arguments.adapter:
        raise UserError(f"which run? try: {words.EXAMPLES[command]}")
    if command == "load" and record.hold != "echo":
        runs.check_finished(runs.locate(arguments.adapter))
    # A daemon that still loads can tell how it is, and be stopped.
    with await connect(record, until_ready=command in ("load", "unload")) as client:
        if command == "status":
            print(printable(describe((record.run, *record.runs[1:]), await client.status())))
        elif command == "load":
            # The daemon may have been started in another folder.
            print(f"loaded {await client.load(str(Path(runs.locate(arguments.adapter)).absolute()))}")
        elif command == "unload":
            print(f"unloaded {await client.unload(arguments.adapter)}")
        else:
            await _stop(client, record)
    return EXIT_DONE


async def _stop(client: Client, record: Record) -> None:
    """Drain, and wait until the daemon has gone; Ctrl-C leaves it to itself."""
    status = await client.drain()
    if num_open := status["busy_slots"] + status["waiting"]:
        print(f"{num_open} requests are answered first", flush=True)
    await starter.wait_until_gone(record)
    print(f"{record.run} is no longer served")


def describe(served: tuple[str, ...], status: dict[str, Any]) -> str:
    """The body of a STATUS answer in plain words, a line each matter."""
    info = status["info"]
    model = f"{info['model']} ({info['hold']}, {info['dtype']}), " if info else ""
    first, between = (_times(status[name]) for name in ("first_token_ms", "inter_token_ms"))
    endings = ", ".join(f"{number} {how}" for how, number in sorted(status["requests"].items()))
    num_requests = sum(status["requests"].values())
    memory = status["rss_bytes"] + sum(engine["rss_bytes"] for engine in status["engines"])
    lines = [
        f"{', '.join(served)}: {model}{status['state']}, process {status['pid']}, up {status['uptime_s']:,.0f} s",
        f"slots       {status['busy_slots']} of {status['num_slots']} busy, {status['waiting']} requests waiting, "
        f"{status['clients']} clients",
        f"speed       {status['tokens_per_second']:,} tokens/s now, {status['tokens']:,} tokens since the start",
        f"first token {first}; between tokens {between}",
        f"requests    {num_requests:,} ended" + (f": {endings}" if endings else ""),
        *(_adapter(AdapterInfo(**fields)) for fields in info.get("adapters", ())),
        *(_engine(number, engine) for number, engine in enumerate(status["engines"])),
        f"memory      {memory / 2**20:,.0f} MiB in all processes",
        # On a processor nothing is recorded, and there is nothing to say.
        *([f"CUDA graphs {graphs}"] if (graphs := info.get("graphs", "off")) != "off" else []),
        *(f"note        {note}" for note in info.get("notes", ())),
    ]
    return "\n".join(lines)


def _times(times: dict[str, float | None]) -> str:
    return ", ".join(f"{share} {value:,} ms" for share, value in times.items() if value is not None) or "none yet"


def _adapter(adapter: AdapterInfo) -> str:
    moved = "" if adapter.kl is None else f", {adapter.kl:.3g} nats from the base"
    where = f", from {adapter.run}" if adapter.run else ""
    return f"adapter     {adapter.key}: {adapter.method}, context {adapter.context:,} tokens{moved}{where}"


def _engine(number: int, engine: dict[str, Any]) -> str:
    load = f"{engine['busy_slots']} slots busy, {engine['waiting']} waiting"
    return (
        f"engine {number}    {engine['state']}, process {engine['pid']}, {load}, {engine['rss_bytes'] / 2**20:,.0f} MiB"
    )
