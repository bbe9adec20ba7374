"""The third-party example: installed with pip, listed, given options, run as a job, failing cleanly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/modelgrove-outliers"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(EXAMPLE)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return target


@pytest.fixture
def modelgrove(site, tmp_path):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site), "MODELGROVE_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "modelgrove_hub", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert run("init").returncode == 0
    return run


def test_it_is_listed_with_its_distribution(modelgrove):
    listed = {row["name"]: row for row in json.loads(modelgrove("plugin", "ls", "--json").stdout)}
    assert listed["outliers"]["state"] == "ok"
    assert listed["outliers"]["distribution"] == "modelgrove-outliers"


def test_it_keeps_the_contract(modelgrove):
    done = modelgrove("plugin", "check", "analyzer.outliers")
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_takes_its_options_and_reports(modelgrove, tmp_path):
    weight = torch.ones(64, 64)
    weight[0, 0] = 100.0
    weight[1, 1] = -100.0
    save_file({"a.weight": weight, "b.weight": torch.eye(64), "bias": torch.ones(4)}, tmp_path / "model.safetensors")
    modelgrove("ingest", str(tmp_path / "model.safetensors"))
    done = modelgrove("analyze", "model", "--method", "outliers", "--sigmas", "9", "--top", "1", "--local", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["outputs"]["report"]
    assert report["layers"] == 2
    assert report["worst"] == pytest.approx({"a.weight": 2 / 4096})


def test_a_wrong_option_is_refused_in_one_line(modelgrove, tmp_path):
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    modelgrove("ingest", str(tmp_path / "model.safetensors"))
    done = modelgrove("analyze", "model", "--method", "outliers", "--sigmas", "0.5", "--local")
    assert done.returncode == 2
    assert "sigmas" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_it_cannot_read_fails_cleanly(modelgrove, tmp_path):
    save_file({"bias": torch.ones(4)}, tmp_path / "flat.safetensors")
    modelgrove("ingest", str(tmp_path / "flat.safetensors"))
    done = modelgrove("analyze", "flat", "--method", "outliers", "--local")
    assert done.returncode == 6
    assert "no matrices" in done.stderr


def test_the_guide_is_the_example():
    guide = (ROOT / "docs/plugins.md").read_text("utf-8")
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", guide, re.DOTALL)
    assert blocks[:2] == [(EXAMPLE / name).read_text("utf-8") for name in ("modelgrove_outliers.py", "pyproject.toml")]
