"""The Dockerfile, played: its COPY lines fill an empty folder, and what its user runs there is run there, without a network."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launcher.variables import ROOT

pytestmark = pytest.mark.slow
PACKAGES = "from setuptools.dist import Distribution; d = Distribution(); d.parse_config_files(); print(*d.packages)"


def steps() -> list[tuple[str, list[str]]]:
    """The instructions for the image's user; those before are for root, on a Debian of its own."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    found = [(name, [word for word in words if name != "COPY" or not word.startswith("--")]) for name, *words in lines]
    return found[[name for name, _ in found].index("USER") :]


def copied() -> list[tuple[int, str]]:
    """Everything that a COPY names, with the number of its step."""
    return [(number, word) for number, (name, words) in enumerate(steps()) if name == "COPY" for word in words[:-1]]


def ignored(folder: str, names: list[str]) -> set[str]:
    """The names that no builder sees, by .dockerignore."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    assert not any(pattern.startswith("!") for pattern in patterns), "not played here"
    paths = {name: os.path.relpath(Path(folder, name), ROOT) for name in names}
    return {
        name for name, path in paths.items() for pattern in patterns
        if fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(f"/{path}", pattern.replace("**/", "*/"))
    }  # fmt: skip


def copy(sources: list[str], target: Path, is_folder: bool) -> None:
    # Everything is as new as in a fresh clone, also what an earlier step has used.
    (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
    for source in (ROOT / word for word in sources):
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True, copy_function=shutil.copy)
        else:
            shutil.copy(source, target)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every Python has all that is installed here, Afinar aside, and so needs no pip of its own; nothing is fetched."""
    installed, python = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("bin") / "python"
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "afinar" not in path.name:
            (installed / path.name).symlink_to(path)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" $([ "$2" != venv ] || echo --without-pip)\n')
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "VIRTUAL_ENV"))}
    return {**kept, "PYTHON": str(python), "PYTHONPATH": str(installed), "PIP_NO_INDEX": "1"}


def play(folder: Path, environment: dict[str, str], without: tuple[int, str] | None = None) -> str:
    """What the steps print in an empty folder, then `plan` from what they have set up; raises where one fails."""
    output = ""
    for number, (name, words) in enumerate(steps()):
        if name == "COPY":
            left = [word for word in words[:-1] if (number, word) != without]
            copy(left, folder / words[-1], is_folder=words[-1].endswith(("/", ".")))
        elif name == "RUN":
            output += run(["sh", "-c", " ".join(words)], folder, environment)
    # Nothing is left to set up.
    run(["make", "--question", "setup"], folder, environment)
    # From another folder: it is the editable install that finds the code, and the code that finds its configs.
    return output + run([folder / ".venv/bin/python", "-m", "launcher", "plan"], folder.parent, environment)


def run(command: list[str | Path], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stdout)
    return done.stdout


@pytest.fixture(scope="module")
def image(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder at the end, and what was printed."""
    folder = tmp_path_factory.mktemp("home") / "app"
    folder.mkdir()
    return folder, play(folder, environment)


def test_the_image_is_set_up_once_and_plans(image: tuple[Path, str]) -> None:
    folder, output = image
    assert output.count("setting up .venv") == 1
    assert "Next: " in output
    assert not (folder / ".git").exists()


def test_the_environment_is_kept_when_sources_change() -> None:
    names = [name for name, _ in steps()]
    before = [word for number, word in copied() if number < names.index("RUN")]
    assert set(before) == {"Makefile", "requirements.lock"}


@pytest.mark.parametrize("without", copied(), ids=lambda pair: pair[1])
def test_everything_that_is_copied_is_needed(
    environment: dict[str, str], without: tuple[int, str], tmp_path: Path
) -> None:
    (tmp_path / "app").mkdir()
    with pytest.raises(RuntimeError, match=r"No such file|No rule|no makefile|neither 'setup.py' nor"):
        play(tmp_path / "app", environment, without)


def test_every_folder_of_code_is_a_package_and_nothing_else_is(
    image: tuple[Path, str], environment: dict[str, str]
) -> None:
    folder, _ = image
    # What a build, a run and a package that has moved away leave behind.
    for stale in ("build/lib/launcher/__init__.py", "runs/launcher/__init__.py", "launcher/gone/__pycache__/gone.pyc"):
        (folder / stale).parent.mkdir(parents=True)
        (folder / stale).touch()
    code = {path.parent.relative_to(ROOT) for name in ("launcher", "serve") for path in (ROOT / name).rglob("*.py")}
    packages = run([folder / ".venv/bin/python", "-c", PACKAGES], folder, environment).split()
    assert sorted(packages) == sorted(".".join(path.parts) for path in code)
