"""What cannot be served now is refused before an engine hears of it: an unknown adapter, a full queue."""

from serve.answers import Answers
from serve.engine import AdapterError, resolve
from serve.figures import Figures
from serve.fleet import Fleet
from serve.open_requests import Session
from serve.protocol import Code, ProtocolError
from serve.settings import Settings
from serve.submission import Submission


def check_adapter(fleet: Fleet, runs: dict[str, str], asked: Submission, request: bytes) -> None:
    """Raise `ProtocolError` if no engine has the adapter, nor is about to load it as one of `runs`, by name."""
    adapters = fleet.first.adapters
    if not adapters:
        # None is ready: it will know best.
        return
    try:
        resolve(adapters, asked.adapter)
    except AdapterError as fault:
        name = (asked.adapter or "").partition("@")[0]
        if name in runs and all(adapter.name != name for adapter in adapters):
            # An engine that was started again is about to load it.
            return
        names = [adapter.key for adapter in adapters]
        raise ProtocolError(Code.NO_ADAPTER, str(fault), request, adapters=names) from None


def check_queue(
    answers: Answers, fleet: Fleet, settings: Settings, figures: Figures, session: Session, request: bytes
) -> None:
    """Raise `ProtocolError` if too many requests wait, of all clients or of this one.

    So does, at the engine, one that was cancelled and that the engine may not have read yet; and of this client, an ending
    that it does not read.
    """
    waiting, leaving = answers.waiting, fleet.leaving
    unread = [r for r in answers.open.values() if r.terminal is not None]
    own = sum(r.session is session for r in (*waiting, *unread)) + leaving.count(session.number)
    for have, most, whose in ((len(waiting) + len(leaving), settings.queue, ""), (own, settings.share, " of yours")):
        if have >= most:
            after = figures.retry_after_ms(have)
            text = f"{have} requests{whose} wait already; try again in {after / 1e3:.1f} s"
            raise ProtocolError(Code.QUEUE_FULL, text, request, waiting=have, max=most, retry_after_ms=after)
