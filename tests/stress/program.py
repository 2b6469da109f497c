"""The frame of every stress program: its seed and variables are printed first, its verdict last."""

import sys
import traceback
from collections.abc import Callable, Sequence

from bench.daemon import chosen
from launcher.errors import EXIT_OURS, UserError, nearest, run_main


def begin(args: Sequence[str], *, has_daemon: bool = False, **defaults: str) -> tuple[dict[str, str], list[str]]:
    """Print and return (the variables of a program, with these defaults and SEED=0; all other words, for its daemon).

    Raises `UserError` for a word that nobody knows.
    """
    own, others = chosen(args, SEED="0", **defaults)
    if others and not has_daemon:
        raise UserError(f"{others[0]}: unknown; {nearest(others[0].partition('=')[0], own)}")
    told = [f"{name}={value}" for name, value in own.items() if name != "SEED"]
    print(f"seed {own['SEED']}:", *told, *others, flush=True)
    return own, others


def finish(faults: Sequence[str], summary: str, log: str = "") -> int:
    """Print the verdict, before it the faults and the log of a daemon if there are any faults; the exit code."""
    if faults:
        print(log, *(f"fault: {fault}" for fault in faults), sep="\n")
    print(f"{'FAILED' if faults else 'passed'}: {summary}", flush=True)
    return int(bool(faults))


def run_program(main: Callable[[list[str]], int]) -> None:
    """Run a program and leave with its exit code; an exception of its own is a verdict too."""

    def judged(args: list[str]) -> int:
        try:
            return main(args)
        except UserError:
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            print(f"FAILED: {type(error).__name__}")
            return EXIT_OURS

    run_main(judged)
