"""The make variables (`PEFT=lora MODEL=smollm2-135m NGPU=2 …`): parsed and checked before anything else happens.

Standard library only: `make` runs this file with the system's Python before it sets up the environment, so a mistyped
name costs a fraction of a second and not an installation.
"""

import ast
import difflib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError, nearest, run_main

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
EMBEDDED_TASK = "cafe"
DEFAULT_PEFT = "lora"
DEFAULT_MODEL = "smollm2-135m"
NAMES = (
    "PEFT", "MODEL", "NGPU", "DATA", "STRATEGY", "RUN",
    "HARDWARE", "PROBE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
# What only the front door reads; the rest is handed on to launcher.train as it was given.
FRONT_DOOR = ("NGPU", "STRATEGY", "HARDWARE", "PROBE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md")
DATA_FORMS = f"a {' '.join(DATA_SUFFIXES)} file, a folder of texts, or a hub dataset org/name"


@dataclass(frozen=True)
class Variables:
    """What was given on the command line; None where the variable was not set."""

    peft: str | None = None
    model: str | None = None
    ngpu: int | None = None
    data: str | None = None
    strategy: str | None = None
    run: str | None = None
    hardware: str | None = None
    is_probed: bool = False
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    config_file: str | None = None
    overrides: tuple[str, ...] = ()


def shipped(kind: str) -> list[str]:
    """The names of the files in `configs/<kind>/`, without their suffix."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


@functools.cache
def option_names() -> list[str]:
    """Every `section.option`, read from the source of `config`, which cannot be imported before it is installed."""
    tree = ast.parse((ROOT / "launcher" / "config.py").read_text(encoding="utf-8"))
    fields = {
        node.name: [
            part.target.id
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    return [f"{section}.{option}" for section in fields["Config"] for option in fields[section.capitalize()]]


def parse(args: list[str]) -> Variables:
    """Read `[CONFIG.yaml] [VARIABLE=value …] [section.option=value …]`; raises `UserError` with every fault found."""
    values: dict[str, str] = {}
    overrides: list[str] = []
    files: list[str] = []
    faults: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if not equals:
            files.append(arg)
        elif name in NAMES:
            if value:
                values[name] = value
        elif name in option_names():
            overrides.append(arg)
        elif "." in name:
            faults.append(f"{name}: unknown option; {nearest(name, option_names())} The list is in launcher/config.py")
        else:
            faults.append(f"{name}: unknown variable; {nearest(name, NAMES)} Options are written section.option=value.")
    faults += [f"{file}: no such file; try one of configs/runs/*.yaml" for file in files if not Path(file).is_file()]
    if len(files) > 1:
        faults.append(f"only one configuration file can be given, not {len(files)}; try {files[0]} alone")
    for name, check in CHECKS.items():
        if name in values and (fault := check(values[name])):
            faults.append(f"{name}={values[name]}: {fault}")
    if not faults:
        faults += [fault for check in (_check_one_process, _check_nodes) if (fault := check(values))]
    if faults:
        raise UserError(*faults)
    return Variables(
        peft=values.get("PEFT"),
        model=values.get("MODEL"),
        ngpu=int(values["NGPU"]) if "NGPU" in values else None,
        data=values.get("DATA"),
        strategy=values.get("STRATEGY"),
        run=values.get("RUN"),
        hardware=values.get("HARDWARE"),
        is_probed=values.get("PROBE") == "yes",
        num_nodes=int(values.get("NNODES", "1")),
        node_rank=int(values.get("NODE_RANK", "0")),
        master_addr=values.get("MASTER_ADDR"),
        master_port=int(values["MASTER_PORT"]) if "MASTER_PORT" in values else None,
        config_file=files[0] if files else None,
        overrides=tuple(overrides),
    )


def _check_one_process(values: dict[str, str]) -> str | None:
    return one_process_only(values) if values.get("PEFT") == "qlora" else None


def _check_nodes(values: dict[str, str]) -> str | None:
    """Whether what says how several machines meet is complete, and nothing of it idle."""
    num_nodes, rank = int(values.get("NNODES", "1")), int(values.get("NODE_RANK", "0"))
    if num_nodes == 1:
        idle = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name in values]
        return f"{idle[0]}: there is one machine only; try it with NNODES=2, or without it" if idle else None
    if values.get("PEFT") == "qlora":
        return f"PEFT=qlora trains in one process, not on NNODES={num_nodes}; try: make train PEFT=qlora"
    if "MASTER_ADDR" not in values:
        return f"NNODES={num_nodes}: where do they meet? try MASTER_ADDR=<name or address of the first machine>"
    if rank >= num_nodes:
        return f"NODE_RANK={rank}: the machines are numbered 0 to {num_nodes - 1}; try NODE_RANK={num_nodes - 1}"
    return None


def one_process_only(values: dict[str, str]) -> str | None:
    """Why qlora cannot be trained as asked by `NGPU` and `STRATEGY`, with the commands that work."""
    ngpu, strategy = values.get("NGPU", "1"), values.get("STRATEGY", "auto")
    if ngpu == "1" and strategy in ("auto", "single"):
        return None
    return (
        f"PEFT=qlora trains in one process (its 4-bit base is not sharded), not NGPU={ngpu} STRATEGY={strategy}; "
        f"try: make train PEFT=qlora   or: make train PEFT=lora NGPU={max(int(ngpu), 2)}"
    )


def _check_peft(value: str) -> str | None:
    methods = shipped("peft")
    return None if value in methods else f"unknown method; {nearest(value, methods)} Try PEFT={DEFAULT_PEFT}"


def check_model(value: str) -> str | None:
    """What is wrong with a model's name, None if nothing is."""
    names = shipped("models")
    if value in names or Path(value, "config.json").is_file():
        return None
    if Path(value).is_dir():
        return "this folder holds no model (no config.json); try a folder written by save_pretrained"
    if value.startswith((".", "/", "~")):
        return f"no such folder; try one of {', '.join(names)}, or a hub id such as org/name"
    if HUB_ID.fullmatch(value):
        return None
    return f"unknown model; {nearest(value, names)} A hub id is written org/name; try MODEL={DEFAULT_MODEL}"


def _check_ngpu(value: str) -> str | None:
    return None if re.fullmatch(r"[1-9]\d{0,3}", value) else "must be a whole number of processes; try NGPU=1"


def check_data(value: str) -> str | None:
    """What is wrong with a data source, None if nothing is."""
    if value == EMBEDDED_TASK or is_hub_data(value):
        return None
    try:
        return _check_path(value)
    except OSError as error:
        return f"cannot be read ({error.strerror}); try another path, or DATA={EMBEDDED_TASK}"


def is_hub_data(value: str) -> bool:
    """Whether a data source is a dataset of the hub: written `org/name`, and no file or folder here."""
    return bool(HUB_ID.fullmatch(value)) and not _names_file(Path(value)) and not os.path.lexists(value)


def text_files(folder: Path) -> Iterator[Path]:
    """The texts below a folder, in no particular order; what is hidden stays out."""
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        # A broken link is told when it is read.
        if path.suffix.lower() in TEXT_SUFFIXES and not is_hidden and (path.is_file() or path.is_symlink()):
            yield path


def _names_file(path: Path) -> bool:
    return path.suffix.lower() in DATA_SUFFIXES


def _check_path(value: str) -> str | None:
    path = Path(value)
    if path.is_dir():
        if not _names_file(path):
            return None if any(text_files(path)) else f"no .txt or .md file in this folder; {_nearest_file(path / 'x')}"
        return f"a folder, not a {path.suffix} file; {_nearest_file(path)}"
    if path.is_file():
        return None if _names_file(path) else f"not a data file; {_nearest_file(path)}"
    if path.is_symlink() and not path.exists():
        return f"a link to nothing; {_nearest_file(path)}"
    if path.exists():
        return f"not a regular file, it can be read only once; {_nearest_file(path)}"
    if _names_file(path) or "/" in value:
        return f"no such file; {_nearest_file(path)}"
    return f"unknown data; {nearest(value, [EMBEDDED_TASK])} Try DATA={EMBEDDED_TASK} or {DATA_FORMS}"


def _nearest_file(path: Path) -> str:
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    beside = sorted(p.name for p in files if _names_file(p) and p.is_file())
    close = difflib.get_close_matches(path.name, beside, n=1) or beside[:8]
    hint = nearest(path.name, close) + " " if close else ""
    return f"{hint}try DATA={EMBEDDED_TASK} or {DATA_FORMS}"


def check_strategy(value: str) -> str | None:
    """What is wrong with a strategy's name, None if nothing is."""
    strategies = ["auto", *shipped("strategy")]
    return None if value in strategies else f"unknown strategy; {nearest(value, strategies)} Try STRATEGY=auto"


def _check_run(value: str) -> str | None:
    if Path(value).name == "base":
        return "in a chat base is the model without an adapter; try RUN=my-run"
    if value.startswith("~"):
        return f"the shell has not put your home in place of ~; try RUN=$HOME/{value.partition('/')[2] or 'my-run'}"
    if re.fullmatch(r"[\w./~ -]+", value) and not value.startswith("-"):
        return None
    return "a run is a folder name of letters, digits, . _ and -; try RUN=my-run"


def _check_hardware(value: str) -> str | None:
    is_known = re.fullmatch(r"([1-9]\d{0,3}x)?[1-9]\d{0,3}GB", value)
    return None if is_known else "GPUs and the memory of each are written 4x24GB; try HARDWARE=4x24GB"


def _check_probe(value: str) -> str | None:
    return None if value == "yes" else "a probe is made or not; try PROBE=yes, or without it"


def _check_num_nodes(value: str) -> str | None:
    return None if re.fullmatch(r"[1-9]\d{0,3}", value) else "must be a whole number of machines; try NNODES=2"


def _check_node_rank(value: str) -> str | None:
    return None if re.fullmatch(r"\d{1,4}", value) else "the first machine is 0, the next is 1; try NODE_RANK=0"


def _check_address(value: str) -> str | None:
    is_name = re.fullmatch(r"[\w.:-]+", value)
    return None if is_name else "must be a host name or an address; try MASTER_ADDR=node-0"


def _check_port(value: str) -> str | None:
    is_port = value.isdecimal() and 1024 <= int(value) <= 65535
    return None if is_port else "must be a port from 1024 to 65535; try MASTER_PORT=29600, or without it"


CHECKS = {
    "HARDWARE": _check_hardware,
    "PROBE": _check_probe,
    "NNODES": _check_num_nodes,
    "NODE_RANK": _check_node_rank,
    "MASTER_ADDR": _check_address,
    "MASTER_PORT": _check_port,
    "PEFT": _check_peft,
    "MODEL": check_model,
    "NGPU": _check_ngpu,
    "DATA": check_data,
    "STRATEGY": check_strategy,
    "RUN": _check_run,
}


def main(args: list[str]) -> int:
    """Check only; prints nothing when all is well."""
    parse(args)
    return 0


if __name__ == "__main__":
    run_main(main)
