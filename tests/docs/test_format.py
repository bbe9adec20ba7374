"""The reader in docs/format.md, run as it stands, agrees with modelgrove's own."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.formats.quantized import QuantManifest
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels.bitstream import pack_bits
from modelgrove_kernels.layouts import sparse_parts
from modelgrove_kernels.packing import quantize
from modelgrove_plugins.compress.packed import dequantized, dequantized_file, describe, packed_parts
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


def table_parts(rows, columns, bits, vector):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(2**bits, (rows, columns // vector), generator=generator).to(torch.uint8)
    table = torch.randn(rows, 2**bits, vector, generator=generator)
    return {"codes": pack_bits(codes, bits), "table": table, "scales": torch.rand(rows, 1, generator=generator)}


TURNED = {
    "rotation": torch.linalg.qr(torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(2))).Q.contiguous(),
    "permutation": torch.randperm(24, generator=torch.Generator().manual_seed(3)).int(),
}
BRANCH = {"up": torch.ones(5, 2).half(), "down": torch.ones(2, 24).half(), "smooth": torch.rand(24) + 0.5}
FORMS = {
    "codebook": ({"layout": "lut", "bits": 3, "group": 24, "tables": "row"}, table_parts(5, 24, 3, 1)),
    "vectors": ({"layout": "lut", "bits": 5, "group": 24, "tables": "row", "vector": 4}, table_parts(5, 24, 5, 4)),
    "sparse": (
        {"layout": "sparse", "bits": 1, "group": 24, "nonzero": 5},
        sparse_parts(torch.eye(5, 24), torch.float32),
    ),
    "hadamard": ({"rotation": "hadamard", "block": 8, "rank": 2, "smooth": True}, BRANCH),
    "rotated": ({"rotation": "stored", "block": 4, "rank": 2, "smooth": True}, BRANCH | TURNED),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_documented_reader_reads_every_layout(reader, form, tmp_path):
    namespace = {"__name__": "read"}
    exec(compile(reader.read_text("utf-8"), str(reader), "exec"), namespace)
    fields, parts = FORMS[form]
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    if "codes" not in parts and "mask" not in parts:
        packed = quantize(weight, 4, 8)
        fields, parts = {"layout": "int4", "bits": 4, "group": 8, **fields}, packed_parts(packed) | parts
    stored = describe(weight, parts, **fields)
    manifest = QuantManifest(method="test", parent="0" * 64, tensors={"x": stored.entry})
    named = {f"x.{suffix}": part for suffix, part in parts.items()}
    save_file(named, tmp_path / "m.safetensors", manifest.metadata())
    [(_, wanted)] = dequantized_file(tmp_path / "m.safetensors")
    # Sums of products in another order.
    np.testing.assert_allclose(namespace["read_packed"](tmp_path / "m.safetensors")["x"], wanted, rtol=1e-4, atol=1e-5)


def test_the_documented_reader_runs_as_a_script(reader, packed):
    done = subprocess.run([sys.executable, str(reader), str(packed)], capture_output=True, text=True, check=True)
    assert "conv.weight (16, 20, 3, 3)" in done.stdout


def test_the_reader_is_short():
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 80
