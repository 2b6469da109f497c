"""What each command does. An action gets the talk and what stands behind the command."""

import itertools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from serve.chat import clipboard, export
from serve.chat.conversation import Conversation
from serve.chat.conversation_events import Adapter, Edit, Event, Params, Regenerate, Reset, System, Undo, User
from serve.chat.conversation_file import ConversationFile
from serve.chat.conversation_read import find, listing, read
from serve.chat.files import read_file
from serve.chat.phrases import say
from serve.chat.printable import printable
from serve.chat.sampling import change
from serve.chat.screen import prose
from serve.chat.talk import Talk, describe
from serve.errors import UserError

Action = Callable[[Talk, str], Awaitable[None]]
NUM_LISTED = 10
LIST_CHARACTERS = 60


async def ask(talk: Talk, text: str) -> None:
    """A question for the model, with the files that were attached in front of it."""
    question = "\n\n".join([*talk.attached, text])
    talk.attached = []
    await talk.exchange(User(question))


async def reset(talk: Talk, _: str) -> None:
    """/reset"""
    talk.happen(Reset())
    talk.used = 0
    talk.tell("forgotten")


async def system(talk: Talk, text: str) -> None:
    """/system"""
    if text:
        talk.happen(System("" if text == "-" else text))
        await talk.recount()
    now = talk.conversation.system
    talk.tell("system_is", text=now) if now else talk.tell("no_system")


async def set_params(talk: Talk, text: str) -> None:
    """/set"""
    changed = dict(talk.conversation.params)
    for word in text.split():
        changed = change(changed, word)
    talk.happen(Params(changed))
    await params(talk, "")


async def params(talk: Talk, _: str) -> None:
    """/params"""
    values = " ".join(f"{name}={value}" for name, value in talk.conversation.params.items())
    talk.tell("params_are", values=values) if values else talk.tell("no_params")


async def regenerate(talk: Talk, _: str) -> None:
    """/regenerate"""
    require(talk, Regenerate())
    await talk.exchange(Regenerate())


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
        await talk.exchange(Edit(text))
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
    names = list(dict.fromkeys(text.split()))
    if len(names) < 2:
        raise UserError(say("compare_two", names=" ".join(talk.adapters[:2])))
    await talk.refresh()
    for name in names:
        talk.require_adapter(name)
    require(talk, Regenerate())
    await talk.exchange(Regenerate(), names)


async def stats(talk: Talk, _: str) -> None:
    """/stats"""
    done = talk.last
    if done is None:
        talk.tell("no_stats")
        return
    figures = {**done.usage, **done.timings, "tokens_per_second": round(done.tokens_per_second, 1)}
    talk.screen.print([f"  {name:<20} {value}" for name, value in figures.items()])


async def save(talk: Talk, name: str) -> None:
    """/save"""
    fault = talk.file.save(name)
    talk.tell("error", text=fault) if fault else talk.tell("saved", name=talk.file.name)


async def load(talk: Talk, name: str) -> None:
    """/load"""
    folder = talk.file.path.parent
    found = find(folder, name)
    path = folder / f"{found}.jsonl"
    there, _ = read(path, path.read_bytes())
    talk.file.close()
    talk.file = ConversationFile(folder)
    for event in there.events:
        talk.happen(event)
    talk.begin()
    await talk.recount()
    talk.tell("loaded", name=found, exchanges=exchanges(there))


async def resume(talk: Talk, name: str) -> None:
    """/resume"""
    folder = talk.file.path.parent
    if not name:
        _list(talk, folder)
        return
    resumed = ConversationFile.resume(folder, name)
    talk.file.close()
    talk.file = resumed
    known = {each["name"] for each in talk.client.info["adapters"]}
    if talk.conversation.adapter.partition("@")[0] not in known:
        talk.happen(Adapter(""))
    talk.begin()
    await talk.recount()
    stand = talk.conversation.exchanges
    question = short(stand[-1].question) if stand else "-"
    talk.tell("resumed", name=resumed.name, exchanges=exchanges(talk.conversation), question=question)


def _list(talk: Talk, folder: Path) -> None:
    entries = list(itertools.islice(listing(folder), NUM_LISTED))
    if not entries:
        talk.tell("no_conversations")
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
        talk.screen.print([printable(f"  {entry.name:<24} {when}  {entry.num_exchanges:>3}  {entry.first_words}")])


async def export_to(talk: Talk, text: str) -> None:
    """/export"""
    path = Path(text).expanduser()
    if path.suffix == ".md":
        content = export.to_markdown(talk.conversation)
    elif path.suffix == ".jsonl":
        content = export.to_messages_line(talk.conversation)
    else:
        raise UserError(say("export_ending", path=path))
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise UserError(say("file_exists", path=path)) from None
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}; try another path") from None
    talk.tell("exported" if path.suffix == ".md" else "trains", path=path)


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
    clipboard.copy(text)
    talk.tell("copied", number=len(text))


async def attach(talk: Talk, path: str) -> None:
    """/file"""
    talk.attached.append(read_file(path))
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


def exchanges(conversation: Conversation) -> str:
    """`3 exchanges`."""
    return say("exchanges", number=conversation.num_exchanges)


def short(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= LIST_CHARACTERS else f"{line[: LIST_CHARACTERS - 1]}…"
