"""What the commands do that keep a conversation, find one again, or write it for others."""

import dataclasses
import itertools
import shlex
import time
from pathlib import Path

from serve.chat import export, export_file
from serve.chat.conversation import Conversation
from serve.chat.conversation_events import Adapter, Edit, Regenerate, User, Withdraw
from serve.chat.conversation_file import ConversationFile
from serve.chat.conversation_read import find, listing, read
from serve.chat.files import path_of
from serve.chat.phrases import say
from serve.chat.screen import clipped
from serve.chat.talk import Talk
from serve.errors import UserError

NUM_LISTED = 10
LIST_CHARACTERS = 60


async def save(talk: Talk, name: str) -> None:
    """/save"""
    fault = talk.file.save(name)
    talk.tell("error", text=fault) if fault else talk.tell("saved", name=talk.file.name)


async def load(talk: Talk, name: str) -> None:
    """/load"""
    folder = talk.file.path.parent
    found = find(folder, name)
    path = folder / f"{found}.jsonl"
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise UserError(say("conversation_fault", path=path, fault=fault.strerror)) from None
    there, _ = read(path, data)
    talk.file.close()
    talk.file = ConversationFile(folder)
    talk.happen(*there.events)
    again = await _go_on(talk)
    talk.tell("loaded", name=found, exchanges=exchanges(talk.conversation))
    _offer(talk, again)


async def resume(talk: Talk, name: str) -> None:
    """/resume"""
    folder = talk.file.path.parent
    if not name:
        _list(talk, folder)
        return
    if talk.file.is_begun and find(folder, name) == talk.file.name:
        talk.tell("resumed_here", name=talk.file.name, exchanges=exchanges(talk.conversation))
        return
    resumed = ConversationFile.resume(folder, name)
    talk.file.close()
    talk.file = resumed
    again = await _go_on(talk)
    stand = talk.conversation.exchanges
    question = short(stand[-1].question) if stand else "-"
    talk.tell("resumed", name=resumed.name, exchanges=exchanges(talk.conversation), question=question)
    _offer(talk, again)


async def _go_on(talk: Talk) -> str:
    """Make a conversation that was read ready for the next question; the line that asks again what got no answer, or ""."""
    again = _unanswered(talk.conversation)
    if again:
        talk.happen(Withdraw())
    if not talk.client.is_lost:
        await talk.refresh()
    if (gone := talk.conversation.adapter) and not talk.key(gone):
        talk.happen(Adapter(""))
        talk.tell("adapter_gone", gone=gone, name=talk.adapter)
    talk.begin()
    await talk.recount()
    return again


def _unanswered(conversation: Conversation) -> str:
    """The line that asks the open question again: its client was killed during the answer. "" if none is open."""
    if conversation.open_question is None:
        return ""
    asked = next(event for event in reversed(conversation.events) if isinstance(event, User | Edit | Regenerate))
    if isinstance(asked, Regenerate):
        return "/regenerate"
    return f"/edit {asked.text}" if isinstance(asked, Edit) else asked.text


def _offer(talk: Talk, again: str) -> None:
    if again:
        talk.tell("unanswered", question=short(again))
        talk.screen.prefill(again)


def _list(talk: Talk, folder: Path) -> None:
    entries = list(itertools.islice(listing(folder), NUM_LISTED))
    if not entries:
        talk.tell("no_conversations")
    for entry in entries:
        mark = "*" if talk.file.is_begun and entry.name == talk.file.name else " "
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
        talk.screen.print([clipped(f"{mark} {entry.name:<24} {when}  {entry.num_exchanges:>3}  {entry.first_words}")])


async def export_to(talk: Talk, text: str) -> None:
    """/export"""
    path = path_of(text)
    # With the system turn that was read, whoever gave it.
    read = dataclasses.replace(talk.conversation, system=talk.conversation.system or talk.own_system)
    if path.suffix == ".md":
        if not read.exchanges:
            raise UserError(say("nothing_asked"))
        export_file.write_new(path, export.to_markdown(read))
        talk.tell("exported", path=path)
    elif path.suffix == ".jsonl":
        number = export_file.add_line(path, export.to_messages_line(read))
        held = say("conversations", number=number)
        if number < export.LEAST_TO_TRAIN:
            talk.tell("trains_not", path=path, conversations=held, least=export.LEAST_TO_TRAIN)
        else:
            talk.tell("trains", path=path, conversations=held, quoted=shlex.quote(str(path)))
    else:
        raise UserError(say("export_ending", path=path))


def exchanges(conversation: Conversation) -> str:
    """`3 exchanges`."""
    return say("exchanges", number=conversation.num_exchanges)


def short(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= LIST_CHARACTERS else f"{line[: LIST_CHARACTERS - 1]}…"
