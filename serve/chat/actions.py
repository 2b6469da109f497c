"""What each command does. An action gets the talk and what stands behind the command."""

import asyncio
import shlex
from collections.abc import Awaitable, Callable

from serve.chat import clipboard, export
from serve.chat.asking import exchange
from serve.chat.conversation_events import Adapter, Edit, Event, Params, Regenerate, Reset, System, Undo, User
from serve.chat.files import read_file
from serve.chat.keeping import exchanges, export_to, load, resume, save, short
from serve.chat.phrases import say
from serve.chat.printable import printable
from serve.chat.sampling import change, shown, words
from serve.chat.screen import prose
from serve.chat.talk import Talk, describe
from serve.engine import BASE
from serve.errors import ServeError, UserError

Action = Callable[[Talk, str], Awaitable[None]]


async def ask(talk: Talk, text: str) -> None:
    """A question for the model, with the files that were attached in front of it."""
    attached, talk.attached = talk.attached, []
    number = talk.conversation.num_exchanges
    try:
        await exchange(talk, User("\n\n".join([*attached, text])), text)
    finally:
        # Without a word of answer the question is not asked yet, and the files wait for it again.
        if talk.conversation.num_exchanges == number:
            talk.attached = attached


async def reset(talk: Talk, _: str) -> None:
    """/reset"""
    talk.happen(Reset())
    await talk.recount()
    talk.tell("forgotten")


async def system(talk: Talk, text: str) -> None:
    """/system"""
    if text:
        talk.happen(System("" if text == "-" else text))
        await talk.recount()
    if now := talk.conversation.system:
        talk.tell("system_is", text=now)
    elif own := talk.own_system:
        talk.tell("system_own", text=own)
    else:
        talk.tell("no_system")


async def set_params(talk: Talk, text: str) -> None:
    """/set"""
    changed = dict(talk.conversation.params)
    for word in words(text):
        changed = change(changed, word)
    talk.happen(Params(changed))
    await params(talk, "")


async def params(talk: Talk, _: str) -> None:
    """/params"""
    values = shown(talk.conversation.params)
    talk.tell("params_are", values=values) if values else talk.tell("no_params")


async def regenerate(talk: Talk, _: str) -> None:
    """/regenerate"""
    require(talk, Regenerate())
    await exchange(talk, Regenerate(), "/regenerate")


async def undo(talk: Talk, _: str) -> None:
    """/undo"""
    require(talk, Undo())
    question = talk.conversation.exchanges[-1].question
    talk.happen(Undo())
    await talk.recount()
    talk.tell("undone", question=short(question))


async def edit(talk: Talk, text: str) -> None:
    """/edit"""
    require(talk, Edit(text))
    if text:
        await exchange(talk, Edit(text), f"/edit {text}")
    else:
        talk.screen.prefill(f"/edit {talk.conversation.exchanges[-1].question}")


async def adapter(talk: Talk, name: str) -> None:
    """/adapter"""
    if not name:
        talk.screen.print(prose(describe(talk.client, talk.adapter)))
        return
    await talk.refresh()
    talk.require_adapter(name)
    talk.happen(Adapter(name))
    await talk.recount()
    talk.tell("answers_now", name=name)


async def adapters(talk: Talk, _: str) -> None:
    """/adapters"""
    await talk.refresh()
    for each in talk.client.info["adapters"]:
        mark = "*" if each["name"] == talk.adapter.partition("@")[0] else " "
        key = f"{each['name']}@{each['digest']}" if each["digest"] else each["name"]
        talk.screen.print([printable(f"{mark} {key:<32} {each['method']:<8} KL {each['kl'] or 0:.3g}")])


async def compare(talk: Talk, text: str) -> None:
    """/compare"""
    await talk.refresh()
    if len(talk.adapters) < 2 and not await _fetch_base(talk, text):
        return
    mine = talk.adapter.partition("@")[0]
    other = mine if mine != BASE else next(name for name in talk.adapters if name != BASE)
    names = list({talk.require_adapter(name).key: name for name in text.split() or [BASE, other]}.values())
    if len(names) < 2:
        raise UserError(say("compare_two", names=f"{BASE} {other}"))
    require(talk, Regenerate())
    await exchange(talk, Regenerate(), f"/compare {' '.join(names)}", names)


async def _fetch_base(talk: Talk, names: str) -> bool:
    """Offer to hold a merged run beside its base; False if the person would rather not. Raises `UserError` where it cannot be."""
    is_pair = not names or {name.partition("@")[0] for name in names.split()} == {BASE, *talk.adapters}
    is_merged = talk.client.info["hold"] == "merged"
    # A plain terminal would show nothing for some seconds.
    origin = talk.origin if is_pair and is_merged and talk.screen.has_colour else None
    if origin is None:
        raise UserError(_how_to_compare(talk))
    require(talk, Regenerate())
    talk.tell("compare_again", name=talk.adapter)
    if others := (await talk.client.status())["clients"] - 1:
        talk.tell("cut_off", number=others)
    talk.tell("choose_again")
    if (await talk.screen.choice()).strip().lower() != "r":
        talk.tell("not_asked")
        return False
    try:
        await talk.restart(origin, "adapters")
    except asyncio.CancelledError:
        talk.screen.prefill(f"/compare {names}".rstrip())
        raise
    except ServeError as fault:
        raise UserError(say("compare_failed", text=fault)) from None
    return True


def _how_to_compare(talk: Talk) -> str:
    """What to do where there is nobody to compare with."""
    record, name = talk.client.record, talk.adapter
    if talk.client.info["hold"] != "merged":
        return say("compare_alone", name=name)
    if not record.pid:
        return say("compare_merged_there", name=name, host=record.run)
    return say("compare_merged", name=name, run=shlex.quote(record.run))


async def stats(talk: Talk, _: str) -> None:
    """/stats"""
    done = talk.last
    if done is None:
        talk.tell("no_stats")
        return
    figures = {**done.usage, **done.timings, "tokens_per_second": round(done.tokens_per_second, 1)}
    talk.screen.print([f"  {name:<20} {value}" for name, value in figures.items()])


async def copy(talk: Talk, what: str) -> None:
    """/copy"""
    if what not in ("", "code"):
        raise UserError(say("copy_what"))
    require(talk, Undo())
    answer = talk.conversation.exchanges[-1].answer
    assert answer is not None
    text = answer.text
    if what == "code":
        blocks = export.code_blocks(text)
        if not blocks:
            raise UserError(say("no_code"))
        text = blocks[-1]
    if await asyncio.to_thread(clipboard.by_program, text):
        talk.tell("copied", number=len(text))
    elif talk.screen.has_colour:
        clipboard.by_terminal(text)
        talk.tell("sent", number=len(text))
    else:
        raise UserError(say("no_clipboard"))


async def attach(talk: Talk, path: str) -> None:
    """/file"""
    talk.attached.append(await asyncio.to_thread(read_file, path, is_regular=True))
    await talk.recount()
    talk.tell("attached", path=path)


async def status(talk: Talk, _: str) -> None:
    """/status"""
    told = await (await talk.connected()).status()
    talk.tell(
        "status", busy=told["busy_slots"], slots=told["num_slots"], waiting=told["waiting"],
        turns=exchanges(talk.conversation), name=talk.file.name,
    )  # fmt: skip


ACTIONS: dict[str, Action] = {
    "/reset": reset,
    "/system": system,
    "/set": set_params,
    "/params": params,
    "/regenerate": regenerate,
    "/undo": undo,
    "/edit": edit,
    "/adapter": adapter,
    "/adapters": adapters,
    "/compare": compare,
    "/stats": stats,
    "/save": save,
    "/load": load,
    "/resume": resume,
    "/export": export_to,
    "/copy": copy,
    "/file": attach,
    "/status": status,
}


def require(talk: Talk, event: Event) -> None:
    """Raise `UserError` if there is nothing that this event could happen to."""
    if talk.conversation.problem(event):
        raise UserError(say("nothing_asked"))
