"""Rows of the cache: whatever comes and goes, a row holds what its request has read, and the answering ones are the first."""

import random

import pytest

from serve.echo import EchoEngine
from serve.rows import Rows, common_length
from serve.slots import Request
from serve.stops import StopStrings
from serve.submission import Submission

HEADS = {"plain": 0, "prefixed": 3}


class Lists:
    """A cache of lists in place of tensors."""

    def __init__(self, number: int) -> None:
        self.rows = [[-1] * 40 for _ in range(number)]
        self.moved = 0

    def copy(self, source: int, target: int, length: int) -> None:
        self.rows[target][:length] = self.rows[source][:length]

    def swap(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        first, second = self.rows[one][: lengths[0]], self.rows[other][: lengths[1]]
        self.rows[one][: len(second)], self.rows[other][: len(first)] = second, first
        self.moved += 1


def test_rows_hold_what_was_read_whoever_comes_and_goes() -> None:
    cache = Lists(5)
    rows = Rows(5, cache, lambda adapter: HEADS.get(adapter, 0))
    chance, prompts = random.Random(0), [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 9, 9, 9], [5, 5, 5, 5]]
    live: dict[int, tuple[str, list[int]]] = {}
    reused = 0

    def check(slot: int) -> None:
        adapter, ids = live[slot]
        row = rows.row_of(slot)
        known = rows.rows[row].tokens
        head = HEADS[adapter]
        assert cache.rows[row][:head] == [-7] * head
        assert cache.rows[row][head : head + len(known)] == known == ids[: len(known)]

    def write(slot: int, tokens: list[int]) -> None:
        row, adapter = rows.row_of(slot), live[slot][0]
        at = HEADS[adapter] + len(rows.rows[row].tokens)
        cache.rows[row][at : at + len(tokens)] = tokens
        rows.rows[row].tokens += tokens

    for _ in range(3000):
        free = [slot for slot in range(5) if slot not in live]
        if free and chance.random() < 0.4:
            slot, adapter = free[0], chance.choice(list(HEADS))
            ids = chance.choice(prompts) + [chance.randrange(9) for _ in range(chance.randrange(1, 4))]
            live[slot] = (adapter, list(ids))
            known = rows.start(slot, adapter, ids)
            assert known < len(ids)
            reused += known
            if not known:
                cache.rows[rows.row_of(slot)][: HEADS[adapter]] = [-7] * HEADS[adapter]
            check(slot)
            write(slot, ids[known:])
            rows.answer(slot)
        elif live and chance.random() < 0.3:
            slot = chance.choice(list(live))
            rows.free(slot)
            del live[slot]
        elif live:
            for slot in rows.answering:
                if len(live[slot][1]) < 30:
                    live[slot][1].append(chance.randrange(9))
                    write(slot, live[slot][1][-1:])
        for slot in live:
            check(slot)
        assert sorted(rows.answering) == sorted(live) and rows.num_answering == len(live)
    assert reused > 1000 and cache.moved > 100


def test_a_conversation_goes_on_in_its_row_and_a_stranger_copies() -> None:
    rows = Rows(3, Lists(3))
    assert rows.start(0, "plain", [1, 2, 3, 4]) == 0
    rows.rows[rows.row_of(0)].tokens += [1, 2, 3, 4]
    home = rows.row_of(0)
    rows.free(0)
    # It shares only a beginning: the long one stays where it is.
    assert rows.start(1, "plain", [1, 9, 9]) == 1
    assert rows.row_of(1) != home and rows.rows[home].tokens == [1, 2, 3, 4]
    assert rows.start(2, "plain", [1, 2, 3, 4, 5]) == 4
    assert rows.row_of(2) == home
    rows.free(2)
    assert rows.start(2, "other", [1, 2, 3, 4, 5]) == 0
    rows.free(2)
    rows.forget("plain")
    assert rows.start(2, "plain", [1, 2, 3, 4, 5]) == 0


def test_a_common_beginning_is_found() -> None:
    chance = random.Random(1)
    for _ in range(300):
        one = [chance.randrange(2) for _ in range(chance.randrange(12))]
        other = one[: chance.randrange(12)] + [chance.randrange(2) for _ in range(chance.randrange(5))]
        expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        assert common_length(one, other) == (min(len(one), len(other)) if expected is None else expected)


def test_stop_strings_end_an_answer_wherever_the_pieces_are_cut() -> None:
    text, stops = "one two three END four", ("END", "three EN!", "zzz")
    for size in range(1, len(text) + 1):
        finder, said, found = StopStrings(stops), "", None
        for start in range(0, len(text), size):
            piece, found = finder.push(text[start : start + size])
            said += piece
            if found:
                break
        assert (said, found) == ("one two three ", "END")


def test_what_may_become_a_stop_string_is_held_back_and_given_at_the_end() -> None:
    finder = StopStrings(("###", "<end>"))
    assert finder.push("a##") == ("a", None)
    assert finder.push("b<e") == ("##b", None)
    assert finder.flush() == "<e" and finder.flush() == ""
    assert finder.push("x###<end>") == ("x", "###")
    assert StopStrings(()).push("any") == ("any", None)


@pytest.mark.parametrize(("most", "reason"), [(None, "stop"), (3, "length")])
def test_what_was_held_back_belongs_to_an_answer_that_ends_without_a_stop_string(most: int | None, reason: str) -> None:
    engine = EchoEngine()
    asked = Submission([], max_tokens=most, stop=("###",))
    request = Request(b"", 0, [engine.TURN], asked, engine.info.adapters[0], engine.detokenizer())
    taken = [request.take(token, engine.info.stop_ids) for token in (*b"a##", engine.STOP)[: 4 if most is None else 3]]
    assert "".join(text for text, _ in taken) == "a##"
    assert [why for _, why in taken] == [None] * (len(taken) - 1) + [reason]
