"""How a run is named to make."""

from pathlib import Path

import pytest

from launcher.rundir import make_argument


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("runs/smollm2-135m-lora", ""),
        ("runs/mine", " RUN=mine"),
        ("/data/mine", " RUN=/data/mine"),
        ("runs/my run", " RUN='my run'"),
        ("/my data/run", " RUN='/my data/run'"),
    ],
)
def test_what_is_printed_can_be_typed(folder, said):
    assert make_argument(Path(folder)) == said
