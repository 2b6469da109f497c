"""What Tab completes: commands, who can answer, conversations, files."""

from collections.abc import Callable, Iterable, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from serve.chat.commands import COMMANDS
from serve.chat.phrases import say
from serve.chat.sampling import NAMES

FILE_COMMANDS = ("/file", "/export")
ADAPTER_COMMANDS = ("/adapter", "/compare")
CONVERSATION_COMMANDS = ("/resume", "/load")
SAMPLING = tuple(f"{name}=" for name in NAMES)


class Words(Completer):
    """Completes the last word of a line that begins with a command."""

    def __init__(self, adapters: Callable[[], Sequence[str]], conversations: Callable[[], Sequence[str]]) -> None:
        self._adapters, self._conversations = adapters, conversations
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What the text before the cursor may become."""
        command, blank, rest = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        if not blank:
            yield from (
                Completion(name, -len(command), display_meta=say(name)) for name in COMMANDS if name.startswith(command)
            )
        elif command in FILE_COMMANDS and "\0" not in rest:
            yield from self._paths.get_completions(Document(rest), complete_event)
        else:
            word = rest.rpartition(" ")[2]
            yield from (Completion(name, -len(word)) for name in self._choices(command) if name.startswith(word))

    def _choices(self, command: str) -> Sequence[str]:
        if command in ADAPTER_COMMANDS:
            return self._adapters()
        if command in CONVERSATION_COMMANDS:
            return self._conversations()
        return SAMPLING if command == "/set" else ()
