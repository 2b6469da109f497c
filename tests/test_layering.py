"""The structure holds: who may import whom, what stays free of torch, which file names are forbidden."""

import ast
import importlib.metadata
import json
import sys

from launcher.variables import ROOT
from tests.running import HEAVY, run_python

SERVING = [
    "serve.protocol", "serve.client", "serve.slots", "serve.starter", "serve.engine", "serve.engine_process",
    "serve.daemon", "serve.chat.piped", "serve.chat.terminal", "serve.__main__",
]  # fmt: skip
LAUNCHING = [
    "launcher.variables", "launcher.config", "launcher.catalogue", "launcher.plan", "launcher.hardware",
    "launcher.architecture", "launcher.memory", "launcher.choices", "launcher.strategies", "launcher.supervise",
    "launcher.failures", "launcher.beat", "launcher.stopping", "launcher.probe", "launcher.train", "launcher.data",
    "launcher.sources", "launcher.shapes", "launcher.hubdata", "launcher.compare", "launcher.chat", "launcher.rundir",
    "launcher.weights", "launcher.__main__",
]  # fmt: skip
LOAD = """
import importlib, json, sys
loaded = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded[name] = list(sys.modules)
print(json.dumps(loaded))
"""


def imports(file):
    """Every module a file names in an import, at any depth."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def test_launcher_never_imports_serve():
    assert [f.name for f in files("launcher") if any(m.split(".")[0] == "serve" for m in imports(f))] == []


def test_one_file_of_serve_imports_launcher():
    assert [f.name for f in files("serve") if any(m.split(".")[0] == "launcher" for m in imports(f))] == ["held.py"]


def test_front_doors_load_nothing_heavy():
    # In one interpreter, one after the other: the first that is at fault is named, and those after it.
    done = run_python("-c", LOAD, *SERVING, *LAUNCHING)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert {name: HEAVY & set(loaded[name]) for name in loaded if HEAVY & set(loaded[name])} == {}
    assert [name for name in SERVING if {"launcher", "serve.slot_engine"} & set(loaded[name])] == []


def test_no_file_shadows_a_library():
    installed = {name.split(".")[0] for names in importlib.metadata.packages_distributions() for name in [names]}
    ours = {"launcher", "serve", "tests", "bench"}
    taken = (set(sys.stdlib_module_names) | installed) - ours
    assert [f.name for p in ("launcher", "serve") for f in files(p) if f.stem in taken and f.stem[0] != "_"] == []


def test_the_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [
        f.name for p in ("launcher", "serve") for f in files(p) if f.name != "__init__.py" if f"{f.name} " not in readme
    ] == []
