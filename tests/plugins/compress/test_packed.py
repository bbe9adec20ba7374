"""Packing one tensor and reading it back, of every shape and dtype."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import CorruptFileError, DataError
from modelgrove_hub.formats.quantized import KEY
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels.layouts import decode, layout_of
from modelgrove_plugins.compress.packed import dequantized, dequantized_file, pack, unpack
from modelgrove_plugins.compress.rtn import Rtn

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.sampled_from(DTYPES),
    st.sampled_from([(8, None), (8, 4), (4, 4)]),
)
@settings(max_examples=60, deadline=None)
def test_a_packed_tensor_comes_back_in_its_shape_with_its_error(shape, dtype, grid):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = pack(tensor, *grid)
    back, entry = unpack(stored, "x"), stored.entry
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    error = float((back.double() - tensor.double()).norm() / tensor.double().norm())
    # Half-precision results are rounded once more than the error that the entry tells.
    assert error == pytest.approx(entry.error, abs=8e-3 if dtype == torch.bfloat16 else 1e-3)
    assert entry.bytes == sum(part.nbytes for part in stored.parts.values())


def test_input_channels_lie_innermost():
    tensor = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).reshape(2, 3, 2, 2)
    stored = pack(tensor, 8, None)
    assert stored.entry.axes == (0, 2, 3, 1)
    matrix = decode(layout_of(stored.entry), stored.parts)
    # Kernel position (0, 0) of the three channels comes first; a step of the grid is 11/127.
    assert torch.allclose(matrix[0, :3], tensor[0, :, 0, 0], atol=0.1)


@pytest.fixture
def packed_file(tmp_path):
    save_file({"a.weight": torch.randn(64, 64), "b": torch.arange(3)}, tmp_path / "m.safetensors", {"format": "pt"})
    run_plugin(Rtn(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"smallest": 0})
    return tmp_path / "job/out/m.safetensors"


def test_files_that_are_not_packed_come_as_they_are(packed_file, tmp_path):
    (tmp_path / "mixed").mkdir()
    packed_file.rename(tmp_path / "mixed/packed.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "mixed/plain.safetensors")
    assert [name for name, _ in dequantized(FolderModel(tmp_path / "mixed"))] == ["a.weight", "b", "c"]


def rewrite(path, tensors=None, manifest=None):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if manifest:
        metadata[KEY] = json.dumps(manifest(json.loads(metadata[KEY])))
    save_file((tensors or (lambda kept: kept))(load_file(path)), path, metadata)


def test_a_file_without_a_part_is_corrupt(packed_file):
    rewrite(packed_file, tensors=lambda kept: {name: value for name, value in kept.items() if "scales" not in name})
    with pytest.raises(CorruptFileError, match=r"a\.weight\.scales is missing"):
        list(dequantized_file(packed_file))


def test_a_manifest_that_claims_a_larger_tensor_is_corrupt(packed_file):
    def grow(manifest):
        manifest["tensors"]["a.weight"]["shape"] = [64, 1 << 40]
        return manifest

    rewrite(packed_file, manifest=grow)
    with pytest.raises(DataError):
        list(dequantized_file(packed_file))
