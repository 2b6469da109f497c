"""run.json is all that serving needs, and what it names is what is served: a changed base or template is refused."""

import json
import shutil

import pytest

from launcher.report import read_metrics
from launcher.rundir import text_digest
from tests.running import run_python
from tests.serve_fixtures import box

__all__ = ["box"]


@pytest.fixture
def copies(trained_run, tmp_path):
    """(model folder, finished run) to be damaged."""
    folder = trained_run("lora", "llama").parent
    model, run = (shutil.copytree(folder / name, tmp_path / name) for name in ("model", "run"))
    file = run / "run.json"
    file.write_text(file.read_text().replace(str(folder), str(tmp_path)))
    return model, run


def serve(run, box):
    return run_python("-m", "serve", "daemon", f"RUN={run}", env={"AFINAR_RUNTIME_DIR": str(box.runtime)})


def refusal(run, box):
    done = serve(run, box)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr
    return done.stderr


def manifest(run):
    return json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_it_says_all_that_serving_needs(trained_run):
    run = trained_run("lora", "llama")
    found = manifest(run)
    assert {"name", "id", "revision", "digest", "dtype", "quantisation"} <= found["base"].keys()
    assert found["template_sha256"] == text_digest(found["template"])
    assert found["stop_ids"]
    assert found["results"]["start"]["step"] == 0
    assert found["results"]["step"] == found["training"]["steps"] == len(read_metrics(run))
    assert found["results"]["perplexity"] > 1


@pytest.mark.slow
def test_a_base_of_the_same_size_but_another_content_is_refused(copies, box):
    model, run = copies
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    told = refusal(run, box)
    was = manifest(run)["base"]["digest"]
    assert "the base" in told
    assert was in told
    assert told.count("\n") == 1
    assert len([word for word in told.replace(",", " ").replace(";", " ").split() if len(word) == 64]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("where", ["tokenizer", "run.json"])
def test_a_changed_template_is_refused_with_both_digests(copies, box, where):
    _, run = copies
    found = manifest(run)
    changed = found["template"].replace("assistant", "waiter")
    if where == "run.json":
        (run / "run.json").write_text(json.dumps({**found, "template": changed}))
    else:
        (run / "tokenizer" / "chat_template.jinja").write_text(changed)
    told = refusal(run, box)
    assert f"the chat template in {where}" in told
    assert found["template_sha256"] in told
    assert text_digest(changed) in told


@pytest.mark.slow
def test_a_damaged_adapter_is_not_served(copies, box):
    from safetensors.torch import load_file, save_file

    _, run = copies
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * float("nan")}, file)
    done = serve(run, box)
    assert done.returncode != 0
    assert f"{name} is not finite" in done.stderr
