"""Several machines: two hosts in network namespaces of their own, or, where none can be made, two launchers on one."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from launcher.report import read_metrics
from launcher.variables import ROOT

ARGS = [
    "NNODES=2", "NGPU=1", "data.limit=64", "batch.size=8", "model.dtype=fp32", "optim.lr=1e-2", "eval.examples=2",
    "eval.answers=0",
]  # fmt: skip


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts():
    """[(how to run a command on it, the first one's address)] of two hosts joined by a cable."""
    names = [f"afinar-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"af{os.getpid() % 100_000}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [(["ip", "netns", "exec", name], "10.77.0.1") for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def can_make_hosts():
    if not shutil.which("ip"):
        return False
    try:
        with two_hosts():
            return True
    except subprocess.CalledProcessError:
        return False


@pytest.mark.slow
def test_two_machines_train_one_run(tiny_llama, tmp_path):
    run = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        separate = can_make_hosts()
        hosts = stack.enter_context(two_hosts()) if separate else [([], "127.0.0.1")] * 2
        programs = [
            subprocess.Popen(
                [*host, sys.executable, "-m", "launcher", "train", f"MODEL={tiny_llama}", f"RUN={run}", *ARGS,
                 f"NODE_RANK={rank}", f"MASTER_ADDR={address}"],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank, (host, address) in enumerate(hosts)
        ]  # fmt: skip
        said = [program.communicate(timeout=500) for program in programs]
    assert [program.returncode for program in programs] == [0, 0], said
    assert "saved to" in said[0][0]
    assert said[1][0] == ""  # the first machine does the talking
    training = json.loads((run / "run.json").read_text())["training"]
    assert (training["world_size"], training["engine"]) == (2, "DeepSpeedEngine")
    assert len(read_metrics(run)) == 8
    assert {"rank-0.log", "rank-1.log"} <= {file.name for file in (run / "logs").iterdir()}


def test_the_files_for_clusters_use_variables_and_options_that_exist():
    folder = ROOT / "configs" / "cluster"
    job = next(d for d in yaml.safe_load_all((folder / "kubernetes.yaml").read_text()) if d["kind"] == "Job")
    assert job["spec"]["completionMode"] == "Indexed"
    texts = [(folder / name).read_text() for name in ("slurm.sh", "kubernetes.yaml")]
    for text in texts:
        for word in ("NNODES=", "NODE_RANK=", "MASTER_ADDR=", "NGPU=", "RUN="):
            assert word in text
        assert "29500" not in text
    assert subprocess.run(["bash", "-n", str(folder / "slurm.sh")], check=False).returncode == 0


def program(folder, name, text):
    """A program of that name in place of one that this machine has not."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_node_that_leaves_takes_no_other_with_it_and_the_job_goes_back_into_the_queue(tmp_path):
    bin = tmp_path / "bin"
    program(bin, "srun", f'printf "%s\\n" "$@" > {tmp_path}/srun; exit 75')
    program(bin, "scontrol", f'[ "$1" = show ] && echo node-0 || echo "$@" > {tmp_path}/scontrol')
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_JOB_NAME": "afinar"}
    job |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "32", "PATH": f"{bin}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "configs" / "cluster" / "slurm.sh"), "PEFT=lora"]
    assert subprocess.run(script, env={**os.environ, **job}, check=False).returncode == 75
    told = (tmp_path / "srun").read_text().splitlines()
    assert {"--kill-on-bad-exit=0", "--cpus-per-task=32", "PEFT=lora"} <= set(told)
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_the_image_gets_shared_memory_and_a_folder_for_runs_that_it_may_write(tmp_path):
    program(tmp_path / "bin", "docker", f'echo "$@" > {tmp_path}/docker; ls -d runs')
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "shell"], cwd=tmp_path, env={**os.environ, **path}, check=False
    )
    assert done.returncode == 0
    assert "--ipc=host" in (tmp_path / "docker").read_text().split()
