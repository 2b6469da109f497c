"""Room for a question that does not fit: the person chooses what goes."""

from typing import Any

from serve.chat.conversation import replay
from serve.chat.conversation_events import Drop, Summary
from serve.chat.phrases import say
from serve.chat.talk import Talk
from serve.errors import RequestError

# What an answer needs at least, when turns are dropped to make room.
ROOM_TOKENS = 256


async def make_room(talk: Talk, counts: dict[str, Any]) -> bool:
    """Leave out what the person chooses; False to leave the question unasked. `counts` is the daemon's refusal."""
    if "have" in counts:
        talk.tell("too_long", have=counts["have"], max=counts["max"])
    else:
        talk.tell("far_too_long", number=counts.get("num_characters", ""), max=talk.context)
    number = await _num_to_drop(talk)
    if not number:
        talk.tell("too_long_alone")
        return False
    talk.tell("choose", exchanges=say("oldest", number=number))
    choice = (await talk.screen.choice()).strip().lower()
    if choice not in ("d", "s"):
        talk.tell("not_asked")
        return False
    summary = ""
    if choice == "s":
        talk.tell("your_summary")
        summary = (await talk.screen.choice()).strip()
    talk.happen(Drop(number), *([Summary(summary)] if summary else []))
    talk.tell("dropped", number=number)
    return True


async def _num_to_drop(talk: Talk) -> int:
    """The fewest exchanges without which the question fits, and an answer; 0 if nothing helps."""
    low, high = 1, talk.conversation.num_exchanges - talk.conversation.num_dropped
    if high < 1 or not await _fits_without(talk, high):
        return 0
    while low < high:
        middle = (low + high) // 2
        if await _fits_without(talk, middle):
            high = middle
        else:
            low = middle + 1
    return low


async def _fits_without(talk: Talk, number: int) -> bool:
    shorter = replay([*talk.conversation.events, Drop(number)])
    messages: list[dict[str, Any]] = list(shorter.messages())
    try:
        counted = await talk.client.tokenize(messages, talk.adapter)
    except RequestError:
        return False
    return bool(counted["tokens"] + min(ROOM_TOKENS, talk.context // 4) <= counted["context"])
