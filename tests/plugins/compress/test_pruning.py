"""Pruned models: the right weights go, in true bytes, and Wanda against magnitude on the shipped base."""

from importlib.resources import as_file, files

import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.magnitude import Magnitude
from modelgrove_plugins.compress.packed import dequantized, unpack
from modelgrove_plugins.compress.pruning import keep, largest
from modelgrove_plugins.compress.wanda import Wanda


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base():
    with as_file(files("modelgrove_analyzers.zoo") / "data/zoo-base") as folder:
        yield FolderModel(folder, name="zoo-base", family="zoo")


def test_in_each_row_the_largest_are_kept():
    found = largest(torch.tensor([[4.0, 1, 3, 2], [0, 0, 0, 9]]), 0.5)
    assert found.tolist() == [[True, False, True, False], [False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 24), (6, 5, 3, 3)])
def test_kept_weights_come_back_exactly(shape, dtype):
    values = draw(*shape).to(dtype)
    mask = torch.rand(shape[0], values[0].numel(), generator=torch.Generator().manual_seed(1)) < 0.4
    stored = keep(values, mask)
    wanted = values.permute(0, *range(2, values.ndim), 1).reshape(mask.shape) * mask
    found = unpack(stored, "x")
    assert torch.equal(found.permute(0, *range(2, values.ndim), 1).reshape(mask.shape), wanted)
    assert stored.entry.bytes == mask.shape[0] * -(-mask.shape[1] // 8) + int(mask.sum()) * values.element_size()


def test_magnitude_drops_the_smallest_of_the_layer(tmp_path):
    save_file({"a.weight": draw(64, 96), "b": torch.arange(3)}, tmp_path / "m.safetensors")
    result = run_plugin(Magnitude(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"sparsity": 0.75})
    found = dict(dequantized(FolderModel(tmp_path / "job/out/m.safetensors")))["a.weight"]
    weight = draw(64, 96)
    wanted = weight * (weight.abs() > weight.abs().flatten().kthvalue(int(0.75 * weight.numel())).values)
    assert torch.equal(found, wanted)
    assert result.report["layers"][0]["sparsity"] == 0.75


def test_too_few_zeros_do_not_pay_in_half_precision(tmp_path):
    save_file({"a.weight": draw(64, 96).half()}, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="nothing to quantize"):
        run_plugin(Magnitude(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"sparsity": 0.05})


def test_values_that_are_not_finite_are_refused(tmp_path):
    weight = draw(64, 96)
    weight[3, 4] = torch.nan
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=r"a\.weight: NaN"):
        run_plugin(Magnitude(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {})


def test_wanda_loses_less_than_magnitude_where_little_is_pruned(base, tmp_path):
    # At 50 % they are level, at 70 % magnitude wins: see docs/compression.md.
    values = {"sparsity": 0.2, "fidelity": True}
    found = run_plugin(Wanda(), [base], tmp_path / "wanda", {**values, "pictures": 4, "steps": 4}).report
    plain = run_plugin(Magnitude(), [base], tmp_path / "magnitude", values).report
    assert found["bytes_after"] == pytest.approx(plain["bytes_after"], rel=0.01)
    assert found["fidelity"]["error"] < plain["fidelity"]["error"]
    layers = found["layers"]
    assert sum(layer["output_error"] < layer["output_error_magnitude"] for layer in layers) > 0.8 * len(layers)
