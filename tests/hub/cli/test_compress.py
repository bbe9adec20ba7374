"""What a user sees of a compression: the plan, what was lost, and where the plot is."""

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from modelgrove_hub.cli.compress import compress
from modelgrove_hub.errors import UsageError
from modelgrove_hub.jobs.rows import list_jobs
from modelgrove_hub.planning import plan
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.testing import FolderModel

LAYER = "blocks.0.attn.to_q.weight"


@pytest.fixture
def model(register, network):
    odd = {"odd.weight": torch.randn(65, 77).half(), "thin.weight": torch.randn(4096, 1).half()}
    return register("net", {**network(0), **odd, "norm.weight": torch.ones(64)})


@pytest.mark.parametrize("options", [("--bits", "8"), ("--bits", "4"), ("--bits", "4", "--group-size", "32")], ids=str)
def test_the_plan_is_what_the_job_then_makes(hub, model, run, options):
    planned = run(compress, model, *options, "--dry-run")
    assert list_jobs(hub) == []
    report = run(compress, model, *options, "--local")["outputs"]["report"]

    for name in ("bytes_before", "bytes_after", "quantized", "kept"):
        assert planned[name] == report[name]
    assert planned["layers"] == [
        {name: value for name, value in layer.items() if name != "sqnr_db"} for layer in report["layers"]
    ]


def test_the_plan_of_a_method_that_looks_at_values_is_refused(network, tmp_path):
    class Blind(get_plugin("compressor.rtn")):
        choose = None

    with pytest.raises(UsageError, match=r"compressor\.rtn decides by the values"):
        plan(Blind, FolderModel.__new__(FolderModel), {})


def test_the_plan_as_text_names_every_layer(model, run):
    lines = run(compress, model, "--bits", "4", "--dry-run", text=True)
    (line,) = (line for line in lines if line.startswith(LAYER))
    assert line.split()[1:4] == ["64×64", "int4", "g64"]
    assert not any(line.startswith(("thin", "norm")) for line in lines)


def test_text_names_the_model_on_stdout_and_says_what_was_lost_on_stderr(hub, model):
    result = CliRunner().invoke(compress, [model, "--bits", "4", "--local"], catch_exceptions=False)
    assert result.stdout.split() == ["local/net-rtn"]
    first, *layers, fidelity, plot = result.stderr.splitlines()
    # 64×64: 2048 bytes of codes, 64 scales of 2, 64 zeros; 65×77 has rows of two groups: 64 bytes and twice 3.
    after = 8 * (2048 + 64 * 3) + 65 * (64 + 2 * 3) + 8192 + 256
    assert first == f"rtn: 146.0 KiB → {after / 1024:.1f} KiB (21%), 9 tensors packed, 2 kept"
    decibels = [float(line.split()[0]) for line in layers]
    assert len(decibels) == 5
    assert decibels == sorted(decibels)
    assert fidelity == "not compared with the original: the model is no pipeline with a denoiser"
    assert plot.startswith("layers.png: ")


def test_the_plot_is_kept_with_the_job_and_copied_on_request(hub, model, run, tmp_path):
    job = run(compress, model, "--local", "--out", str(tmp_path / "plots"))
    copied = tmp_path / "plots/layers.png"
    assert copied.read_bytes() == hub.store.path(job["outputs"]["artefacts"]["layers.png"]).read_bytes()
    with Image.open(copied) as picture:
        assert picture.format == "PNG"


def test_without_a_worker_the_job_waits(model, run):
    assert run(compress, model)["state"] == "queued"
