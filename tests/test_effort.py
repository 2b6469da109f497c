"""How much work a run is, and how long the rest of it takes."""

import pytest

from launcher.effort import Effort, Pace, duration
from launcher.loop import is_due


@pytest.mark.parametrize("every", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("steps", [1, 2, 6, 7, 8, 50, 51])
def test_the_evaluations_are_those_that_the_loop_makes(steps, every):
    work = Effort(steps, 10.0, every, read=100, answered=20, end=1000)
    made = [0, *(step for step in range(1, steps) if is_due(step, every, steps)), steps]
    assert work.num_evaluations == len(made)
    assert work.measuring == len(made) * 120 + 1000
    for done in range(1, steps + 1):
        # That of the last step is the end's.
        assert work.evaluations_after(done) == sum(step >= done for step in made)


def test_the_rest_is_counted_with_what_was_measured():
    pace = Pace(Effort(10, 100.0, 5, read=200, answered=50, end=4000), load_s=7.0)
    assert not pace.is_first_known
    pace.add_evaluation(seconds=6.0, read_s=2.0)
    # The first step, which warms up, counts only while there is no other.
    pace.add_step(90.0, 100)
    assert pace.left(1) == 9 * 90.0 + 2 * 6.0 + 4000 * 0.01 + 7.0
    pace.add_step(3.0, 120)
    assert pace.is_first_known
    # 2.5 s for 100 tokens; the evaluations after step 5 and at the end; 10 ms for each of the last 4,000 tokens.
    assert pace.left(2) == pytest.approx(8 * 2.5 + 2 * 6.0 + 40.0 + 7.0)
    pace.add_step(2.5, 100)
    assert not pace.is_first_known
    assert pace.left(10) == pytest.approx(6.0 + 40.0 + 7.0)


def test_a_run_of_one_step_tells_too():
    pace = Pace(Effort(1, 100.0, 5, read=200, answered=50, end=4000), load_s=7.0)
    pace.add_step(1.0, 100)
    assert pace.is_first_known


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words
