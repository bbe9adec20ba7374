"""The reader in docs/format.md, run as it stands, agrees with modelgrove's own."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.packed import dequantized
from modelgrove_plugins.compress.rtn import Rtn

PAGE = Path(__file__).parents[2] / "docs/format.md"


@pytest.fixture
def reader(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "read.py").write_text(code, "utf-8")
    return tmp_path / "read.py"


@pytest.fixture(params=[{"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 8, "granularity": "group"}], ids=str)
def packed(request, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "linear.weight": torch.randn(48, 100, generator=generator),
        "conv.weight": torch.randn(16, 20, 3, 3, generator=generator).half(),
        "norm.weight": torch.ones(48),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    run_plugin(Rtn(), [FolderModel(tmp_path / "model.safetensors")], tmp_path / "job", {"smallest": 0, **request.param})
    return tmp_path / "job/out/model.safetensors"


def test_the_documented_reader_reads_what_modelgrove_reads(reader, packed):
    namespace = {"__name__": "read"}
    exec(compile(reader.read_text("utf-8"), str(reader), "exec"), namespace)
    found = namespace["read_packed"](packed)
    wanted = dict(dequantized(FolderModel(packed)))
    assert found.keys() == {"linear.weight", "conv.weight"}
    for name, weight in found.items():
        # The same float32 product; the original's dtype rounds it once more.
        assert np.array_equal(torch.from_numpy(weight).to(wanted[name].dtype).numpy(), wanted[name].numpy())


def test_the_documented_reader_runs_as_a_script(reader, packed):
    done = subprocess.run([sys.executable, str(reader), str(packed)], capture_output=True, text=True, check=True)
    assert "conv.weight (16, 20, 3, 3)" in done.stdout


def test_the_reader_is_short():
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 30
