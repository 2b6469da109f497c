"""What goes wrong with one request or one adapter of an engine stays with it."""

import shutil

import pytest

from launcher import cafe
from serve.engine import AdapterError, Sampling
from serve.graphs import Graphs, Recording
from tests.derived_runs import derive
from tests.slot_answers import answer, engine

pytestmark = pytest.mark.slow
GREEDY = Sampling()
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def run(trained_run):
    """A finished lora run."""
    return trained_run("lora", "llama")


def prompts(ours, number):
    """Long ones, some chunks each."""
    turns = [turn for example in list(cafe.examples("held_out"))[:number] for turn in example["messages"][:1]]
    return [ours.prompt_ids([turn, turn, turn]) for turn in turns]


def poison(ours, slot):
    """What has been read of this prompt is not a number from now on."""
    ours.cache.keys[0][ours._rows.row_of(slot), :, :4] = float("nan")


def tokens_of(ours, ids):
    return answer(ours, {0: (ids, ours.info.adapters[0].key, GREEDY)}, NUM_TOKENS)[0][0]


def test_a_prompt_that_is_cancelled_leaves_no_numbers_that_are_none(run):
    ours = engine([run], "merged", chunk=16, slots=1)
    one, other = prompts(ours, 2)
    expected = tokens_of(ours, other)
    ours.start(0, one, GREEDY, ours.info.adapters[0].key)
    ours.prefill([0])
    poison(ours, 0)
    (read,) = ours.prefill([0])
    assert read.token is None
    ours.free(0)
    assert tokens_of(ours, other) == expected
    # One that was sound is not read again.
    ours.start(0, one, GREEDY, ours.info.adapters[0].key)
    (read,) = ours.prefill([0])
    ours.free(0)
    assert ours.start(0, one, GREEDY, ours.info.adapters[0].key) == read.done > 0


def test_rows_that_change_places_leave_nothing_behind(run):
    ours = engine([run], "merged", chunk=32, slots=2)
    key = ours.info.adapters[0].key
    one, other = prompts(ours, 2)
    expected = tokens_of(ours, one)
    ours._rows.forget(key)
    ours.start(0, one, GREEDY, key)
    ours.start(1, other, GREEDY, key)
    # The first is still read while the second, in a row behind it, is told its first token, which is none.
    ours.prefill([0])
    ours.prefill([1])
    poison(ours, 1)
    token = None
    while token is None:
        (read,) = ours.prefill([1])
        token = read.token
    assert token == -1
    tokens = []
    while not tokens:
        (read,) = ours.prefill([0])
        tokens = [read.token] if read.token is not None else []
    ours.free(1)
    while len(tokens) < NUM_TOKENS:
        tokens.append(ours.step()[0])
    assert tokens == expected


def test_a_slot_that_cannot_be_started_keeps_no_row(run, monkeypatch):
    ours = engine([run], "merged", slots=2)
    (ids,) = prompts(ours, 1)
    expected = tokens_of(ours, ids)
    with monkeypatch.context() as patch:
        patch.setattr(ours._sampler, "start", lambda *_: 1 / 0)
        for slot in (0, 1, 0):
            with pytest.raises(ZeroDivisionError):
                ours.start(slot, ids, GREEDY, ours.info.adapters[0].key)
    assert tokens_of(ours, ids) == expected


def test_an_adapter_that_is_refused_leaves_no_recorded_steps(run, tmp_path):
    ours = engine([run], "adapters", slots=2)
    (ids,) = prompts(ours, 1)
    silent = derive(run, tmp_path / "silent", 1, strength=0.0)
    recorded = []

    def record(step, inputs, pool):
        recorded.append(step(inputs))
        return Recording(lambda: None, recorded[-1])

    ours._graphs = Graphs(record)
    tokens_of(ours, ids)
    before = len(recorded)
    with pytest.raises(AdapterError, match="answers exactly like its base"):
        ours.load_adapter(str(silent))
    tokens_of(ours, ids)
    assert len(recorded) == 2 * before > 0


def test_no_run_takes_the_name_of_the_base(run, tmp_path):
    ours = engine([run], "adapters", slots=1)
    with pytest.raises(AdapterError, match="try to rename the folder"):
        ours.load_adapter(str(derive(run, tmp_path / "base", 1)))


def test_what_is_served_does_not_change_with_the_file(run, tmp_path):
    ours = engine([run], "adapters", slots=1)
    (ids,) = prompts(ours, 1)
    folder, other = derive(run, tmp_path / "one", 1, method="ia3"), derive(run, tmp_path / "other", 2, method="ia3")
    key = ours.load_adapter(str(folder)).key
    expected = answer(ours, {0: (ids, key, GREEDY)}, NUM_TOKENS)[0]
    ours._rows.forget(key)
    file = folder / "adapter" / "adapter_model.safetensors"
    # In place: the same file, other bytes.
    file.write_bytes((other / "adapter" / file.name).read_bytes())
    shutil.copytree(other, tmp_path / "third")
    ours.load_adapter(str(tmp_path / "third"))
    assert answer(ours, {0: (ids, key, GREEDY)}, NUM_TOKENS)[0] == expected
