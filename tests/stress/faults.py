"""The faults that `mutants` plants: one line of `launcher/` or `serve/` each, and the tests that must notice it."""

from typing import NamedTuple


class Fault(NamedTuple):
    """In `file` the text `old`, which stands there once, becomes `new`; of `tests` (files) those that `names` selects must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    names: str


# What a training learns from.
DATA = (
    Fault(
        "the prompt is trained", "launcher/chat.py",
        "trained += [position <= stop for position in range(len(segment))]",
        "trained += [position <= stop or not is_answer for position in range(len(segment))]",
        "test_chat", "trained_and_nothing_else",
    ),
    Fault(
        "the stop token is not trained", "launcher/chat.py",
        "trained += [position <= stop for", "trained += [position < stop for",
        "test_chat", "trained_and_nothing_else",
    ),
    Fault(
        "packed documents read each other", "launcher/loss.py",
        "return same.tril()", "return torch.ones_like(same).tril()",
        "test_loss", "packed_rows",
    ),
)  # fmt: skip
# How it learns, over processes and interruptions.
TRAINING = (
    Fault(
        "the loss is not scaled by the number of processes", "launcher/loop.py",
        "scale = world * accelerator.gradient_accumulation_steps /", "scale = accelerator.gradient_accumulation_steps /",
        "test_invariance", "shared_out",
    ),
    Fault(
        "the loss is not scaled by the accumulation", "launcher/loop.py",
        "scale = world * accelerator.gradient_accumulation_steps /", "scale = world /",
        "test_invariance", "shared_out",
    ),
    Fault(
        "the warm-up begins with nothing", "launcher/loop.py",
        "return config.optim.lr * (step + 1) / warmup", "return config.optim.lr * step / warmup",
        "test_invariance", "plain_peft",
    ),
    Fault(
        "a rank is lost when the moments are gathered", "launcher/shards.py",
        "moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}",
        "moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}\n"
        "    [moment.view(-1)[moment.numel() // 2 :].zero_() for moment in moments.values()]",
        "test_strategies test_matrix", "goes_on",
    ),
    Fault(
        "a resumed run leaves out a batch", "launcher/loop.py",
        "return found.step\n", "return found.step + 1\n",
        "test_train", "goes_on_where_it_was",
    ),
    Fault(
        "a stopped run says that it is done", "launcher/loop.py",
        "return EXIT_STOPPED", "return 0",
        "test_train test_stop", "sigterm or exit_75",
    ),
    Fault(
        "the watchdog names who waits", "launcher/beat.py",
        "rank = min(silent or self._seen,", "rank = max(silent or self._seen,",
        "test_disk test_failures test_supervise", "others_wait_for",
    ),
)  # fmt: skip
# What is on the disk.
SAVING = (
    Fault(
        "a damaged checkpoint is taken", "launcher/checkpoint.py",
        'if file.stat().st_size != manifest["size"] or sha256(file) != manifest["sha256"]:',
        'if file.stat().st_size != manifest["size"]:',
        "test_checkpoint", "newest_that_verifies",
    ),
    Fault(
        "the gate lets other values through", "launcher/gate.py",
        "elif not torch.equal(tensor.float(), expected[name].detach().float().cpu()):", "elif False:",
        "test_gate", "names_the_tensor",
    ),
    Fault(
        "a conversation is not on the disk before the next turn", "serve/chat/conversation_file.py",
        "            os.fsync(self._file)\n", "",
        "test_conversation_file", "before_append_returns",
    ),
    Fault(
        "a key that others can read is taken", "serve/keys.py",
        "    _require_private(folder)\n    _require_private(path)\n", "    _require_private(folder)\n",
        "test_security", "without_keys",
    ),
)  # fmt: skip
# What is answered, to whom.
SERVING = (
    Fault(
        "a prefix is reused by one token too far", "serve/rows.py",
        "readable = ids[:-1]", "readable = ids",
        "test_rows", "whoever_comes",
    ),
    Fault(
        "rows have each other's adapters", "serve/layers.py",
        "mine = self._owner == self._batch.index.to(", "mine = self._owner == self._batch.index.flip(0).to(",
        "test_slot_engine", "every_adapter_in_one_batch",
    ),
    Fault(
        "the seed is ignored", "serve/sampler.py",
        "s.seed or 0", "0",
        "test_sampler", "seed",
    ),
    Fault(
        "a stop string stays in the text", "serve/stops.py",
        "return text[:at], stop", "return text[: at + len(stop)], stop",
        "test_rows", "stop_strings_end",
    ),
    Fault(
        "what was held back for a stop string is lost", "serve/slots.py",
        'return text + self._stops.flush(), "stop"', 'return text, "stop"',
        "test_rows test_slots test_worker", "held_back",
    ),
    Fault(
        "the last words of a turn wait for the next one", "serve/worker.py",
        "            self._tell(NO_REQUEST)\n        self._flush()\n", "            self._tell(NO_REQUEST)\n",
        "test_worker", "one_message or reads_less",
    ),
    Fault(
        "text is sent without credit", "serve/answers.py",
        "and (request.credit > 0 or request.terminal):", "and True:",
        "test_broker", "without_credit",
    ),
    Fault(
        "who has no key may administer", "serve/administration.py",
        "if message.kind in ADMIN and not self._may(message):",
        'if message.kind in ADMIN and "admin" in message.body and not self._may(message):',
        "test_operations test_daemon", "come_and_go or bad_requests",
    ),
    Fault(
        "a client that was killed keeps its slot",
        "serve/answers.py",
        '        self.end(request, Code.CANCELLED, "cancelled: the client went away", tokens=request.tokens)\n',
        "",
        "test_daemon", "leaves_no_slot",
    ),
    Fault(
        "an escape reaches the terminal", "serve/chat/printable.py",
        r"\x0b-\x1f", r"\x0b-\x1a\x1c-\x1f",
        "test_terminal_attacks", "is_raw and title",
    ),
)  # fmt: skip
# Those that take a training come last.
FAULTS = (*DATA, *SAVING, *SERVING, *TRAINING)
