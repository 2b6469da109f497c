"""What an engine process is told to hold, as its one argument."""

import dataclasses
import json
from dataclasses import dataclass, field

from serve.settings import Settings


@dataclass(frozen=True)
class Load:
    """The finished `runs` (folders) over one base. `hold` and `dtype` may be `auto`.

    The engine talks to the daemon at `endpoint`. `device` is the number of its GPU; a base that is too large for one is
    spread over `num_devices`.
    """

    runs: tuple[str, ...]
    hold: str = "auto"
    dtype: str = "auto"
    settings: Settings = field(default_factory=Settings)
    endpoint: str = ""
    device: int = 0
    num_devices: int = 1

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Load":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return Load(**{**fields, "runs": tuple(fields["runs"]), "settings": Settings(**fields["settings"])})
