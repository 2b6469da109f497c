"""A disk that is full, a folder that cannot be written, a checkpoint damaged by hand, a clock that jumps."""

import contextlib
import errno
import json
import os
import subprocess

import pytest

from launcher import checkpoint, failures
from launcher.beat import Watchdog
from launcher.effort import Effort, Pace
from launcher.held_out import Evaluation
from launcher.report import METRICS, Report, read_evaluations, read_metrics
from tests.running import SMALL, run_python, train

# Four steps, and a checkpoint after each but the last.
FOUR = ("data.limit=32", "checkpoint.every=1")


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes; skips where none can be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_no_step(tiny_llama, tmp_path):
    # Room for one checkpoint of 400 kB; more comes free when half of the steps are done.
    free_later = (
        "import os, threading, time, pathlib\n"
        "metrics, ballast = pathlib.Path('RUN/metrics.jsonl'), pathlib.Path('DISK/ballast')\n"
        "def free():\n"
        "    while not metrics.exists() or metrics.read_text().count(chr(10)) < 6: time.sleep(0.01)\n"
        "    ballast.unlink()\n"
        "threading.Thread(target=free, daemon=True).start()\n"
        "import sys; from launcher.errors import run_main; from launcher.train import main; run_main(main)"
    )
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        (disk / "ballast").write_bytes(b"x" * 7_200_000)
        run = disk / "run"
        args = [f"MODEL={tiny_llama}", f"RUN={run}", *SMALL, "checkpoint.every=2", "optim.epochs=30"]
        done = run_python("-c", free_later.replace("RUN", str(run)).replace("DISK", str(disk)), *args, cold=False)
        assert done.returncode == 0, done.stderr
        assert "the disk is full: no checkpoint of step" in done.stdout
        assert "there is space again: checkpoint of step" in done.stdout
        assert len(read_metrics(run)) == 60
        assert json.loads((run / "run.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_in_one_line_and_keeps_the_last_checkpoint(tiny_llama, tmp_path):
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        run = disk / "run"
        (disk / "ballast").write_bytes(b"x" * 7_000_000)
        done = train(tiny_llama, run, *FOUR)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "the disk is full" in done.stderr
        assert "the same command again" in done.stderr
        assert checkpoint.newest(run)[0].step >= 2
        (disk / "ballast").unlink()
        again = train(tiny_llama, run, *FOUR)
        assert again.returncode == 0, again.stderr
        assert "resumed after step" in again.stdout


def test_a_full_disk_tears_and_loses_no_line(tmp_path):
    work = Effort(num_steps=400, learned=9.0, every=50, read=1, answered=0, end=1)
    with small_disk(tmp_path / "disk", 49_152) as disk:
        (disk / "ballast").write_bytes(b"x" * 32_768)
        with Report(disk, Pace(work, 0.0), start=0, is_main=True) as report:
            for step in range(1, 400):
                report.step(step, {"loss": 1.0, "tokens": 9, "step_s": 0.1, "tokens_per_s": 1.0})
            report.evaluation(Evaluation(399, 1.0, 1))
            with pytest.raises(OSError, match="No space left"):
                (disk / "more").write_bytes(b"x" * 4096)
            assert len(read_metrics(disk)) < 399
            assert read_evaluations(disk) == []
            (disk / "ballast").unlink()
            report.step(400, {"loss": 1.0, "tokens": 9, "step_s": 0.1, "tokens_per_s": 1.0})
        lines = (disk / METRICS).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 401))
        assert [record["step"] for record in read_evaluations(disk)] == [399]


def test_what_a_full_disk_looks_like():
    assert failures.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert failures.is_disk_full(
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert not failures.is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_a_failed_write_leaves_the_others_and_no_litter(tmp_path, monkeypatch):
    import torch

    state = {"param/a": torch.ones(4), "exp_avg_sq/a": torch.ones(4)}
    checkpoint.write(tmp_path, state, {}, step=1, position=1, keep=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path, state, {}, step=2, position=2, keep=2)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00001"]
    assert checkpoint.newest(tmp_path)[0].step == 1


@pytest.mark.parametrize("ngpu", [1, 2])
def test_a_folder_that_cannot_be_written_is_refused(tiny_llama, ngpu):
    done = train(tiny_llama, "/proc/run", f"NGPU={ngpu}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr
    assert "try RUN=" in done.stderr


def test_a_file_where_the_run_should_be(tiny_llama, tmp_path):
    (tmp_path / "run").touch()
    done = train(tiny_llama, tmp_path / "run")
    assert done.returncode == 2
    assert "is not a folder" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_damaged_or_deleted_by_hand_is_passed_over(tiny_llama, tmp_path):
    run = tmp_path / "run"
    assert train(tiny_llama, run, *FOUR, "checkpoint.keep=5").returncode == 0
    reference = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "state": "running"}))
    newest = run / "checkpoints" / "step-00003" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    (run / "checkpoints" / "step-00002" / "manifest.json").unlink()
    done = train(tiny_llama, run, *FOUR, "checkpoint.keep=5")
    assert done.returncode == 0, done.stderr
    assert "passed over" in done.stdout
    assert "step-00003" in done.stdout
    assert "resumed after step 1" in done.stdout
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == reference


def test_the_watchdog_uses_no_clock_that_can_jump(tmp_path):
    dog = Watchdog(tmp_path, timeout_s=100)
    files = [tmp_path / "rank-0.beat", tmp_path / "rank-1.beat"]
    for file in files:
        file.write_text("1 5 0 a micro-batch\n")
    assert dog.look(0) is None
    os.utime(files[0], (0, 0))  # half a century back
    files[0].write_text("2 6 0 a micro-batch\n")
    assert dog.look(99) is None
    files[0].write_text("99 6 0 a micro-batch\n")
    files[1].write_text("99 5 0 a micro-batch\n")
    assert dog.look(150) is None
    assert dog.look(200) == (1, "a micro-batch; its process does not answer at all")


def test_the_watchdog_names_the_one_that_the_others_wait_for(tmp_path):
    dog = Watchdog(tmp_path, timeout_s=20)
    for second in range(0, 40, 2):
        (tmp_path / "rank-0.beat").write_text(f"{second} 12 3 the evaluation\n")
        (tmp_path / "rank-1.beat").write_text(f"{second} 11 0 a micro-batch\n")
        found = dog.look(float(second))
        assert (found is not None) == (second >= 20)
    assert found == (1, "a micro-batch")


def test_nobody_is_named_before_anyone_has_begun(tmp_path):
    dog = Watchdog(tmp_path, timeout_s=5)
    (tmp_path / "rank-0.beat").write_text("1 0 0 starting\n")
    assert dog.look(0) is None
    assert dog.look(1000) is None


def test_a_process_that_answers_alone_is_not_stuck(tmp_path):
    dog = Watchdog(tmp_path, timeout_s=20)
    for second in range(0, 60, 2):
        (tmp_path / "rank-0.beat").write_text(f"{second} 12 {second} the evaluation\n")
        (tmp_path / "rank-1.beat").write_text(f"{second} 12 0 the evaluation\n")
        assert dog.look(float(second)) is None
