"""What a process does not import is what makes it start soon: held here by names, and not by seconds."""

import pytest

from launcher import imports
from serve.engines import engine_environment
from tests.running import run_python

# DeepSpeed is for several processes, matplotlib for the end, the others are torch's compiler and the readers of hub data.
NEVER = ["deepspeed", "matplotlib", "datasets", "pandas", "torch._inductor.compile_fx", "torch._inductor.lowering"]
TELL = f"print('brought:', *(name for name in {NEVER} if name in sys.modules), gc.get_freeze_count() > 10**5, gc.isenabled())"

TRAIN = f"""
import gc, sys
from launcher import report
from launcher.__main__ import main
say = report.Report.step
def step(self, number, metrics):
    say(self, number, metrics)
    {TELL}
report.Report.step = step
sys.exit(main(["train", *sys.argv[1:]]))
"""
ENGINE = f"""
import gc, sys
from serve.engine_process import build
from serve.errors import UserError
from serve.load import Load
try:
    build(Load(("nowhere",)), print)
except UserError:
    {TELL}
"""
PUT_BACK = f"""
import gc, os
from launcher import imports
try:
    with imports.heavy():
        print(os.environ["{imports.NO_COMPILER}"], gc.isenabled(), end=" ")
        raise ImportError
except ImportError:
    print(os.environ.get("{imports.NO_COMPILER}"), gc.isenabled())
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_one_process_has_brought_little_when_it_learns(tiny_llama, tmp_path, method):
    small = ["data.limit=8", "batch.size=8", "optim.max_steps=1", "eval.examples=1", "eval.answers=0"]
    done = run_python("-c", TRAIN, f"PEFT={method}", f"MODEL={tiny_llama}", f"RUN={tmp_path / 'run'}", *small)
    assert done.returncode == 0, done.stderr
    assert "brought: True True" in done.stdout


@pytest.mark.slow
def test_an_engine_brings_little():
    done = run_python("-c", ENGINE, env=engine_environment(1))
    assert done.stdout == "brought: True True\n", done.stderr


@pytest.mark.parametrize("given", [{}, {imports.NO_COMPILER: "0"}], ids=["unset", "set"])
def test_what_was_set_for_the_imports_is_put_back(given):
    done = run_python("-c", PUT_BACK, env=given)
    assert done.stdout == f"1 False {given.get(imports.NO_COMPILER)} True\n", done.stderr
