"""Pruned models: the right weights go, in true bytes, and Wanda against magnitude on the shipped base."""

from importlib.resources import as_file, files

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.planning import plan
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.magnitude import Magnitude
from modelgrove_plugins.compress.packed import dequantized, unpack
from modelgrove_plugins.compress.pruning import keep, largest, shares_of, threshold
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


@pytest.mark.parametrize(
    "text", ["0", "1", "nan", "half", "unet=2", "unet", "0.1,0.2", "=0.3", "unet=.1,unet=.2", "unet=.1,.2", ""]
)
def test_shares_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match=r"share between 0 and 1|each component once"):
        shares_of(text)
    with pytest.raises(UsageError, match="sparsity"):
        plan(Magnitude, FolderModel.__new__(FolderModel), {"sparsity": text})


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), min_size=1),
    st.floats(0.01, 0.99),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_the_threshold_is_the_value_in_that_place_of_all_sorted(lists, share, dtype):
    tensors = [torch.tensor(values).to(dtype) for values in lists]
    everything = np.sort(np.abs(np.concatenate([tensor.float().numpy() for tensor in tensors])))
    assert threshold(lambda: tensors, share) == everything[int(share * len(everything))]


def two_components(folder):
    """Weights of the second component are ten times as large."""
    for number, name in enumerate(("unet", "text_encoder")):
        (folder / name).mkdir()
        weights = {f"{layer}.weight": draw(64, 96, seed=10 * number + layer) * 10**number for layer in range(2)}
        weights["0.weight"] *= 3
        save_file(weights, folder / name / "m.safetensors")
    return FolderModel(folder, name="two")


def sparsities(report):
    return {layer["name"]: layer["sparsity"] for layer in report["layers"]}


def test_each_component_has_its_share(tmp_path):
    (tmp_path / "two").mkdir()
    model = two_components(tmp_path / "two")
    found = run_plugin(Magnitude(), [model], tmp_path / "a", {"sparsity": "unet=0.35,text_encoder=0.475"}).report
    assert sparsities(found) == pytest.approx(
        {"text_encoder/0.weight": 0.475, "text_encoder/1.weight": 0.475, "unet/0.weight": 0.35, "unet/1.weight": 0.35},
        abs=2e-4,
    )
    one = run_plugin(Magnitude(), [model], tmp_path / "b", {"sparsity": "text_encoder=0.5"}).report
    assert set(sparsities(one)) == {"text_encoder/0.weight", "text_encoder/1.weight"}


def test_a_global_threshold_is_one_for_all_layers_of_a_component(tmp_path):
    (tmp_path / "two").mkdir()
    model = two_components(tmp_path / "two")
    report = run_plugin(Magnitude(), [model], tmp_path / "job", {"sparsity": 0.5, "scope": "global"}).report
    shares = sparsities(report)
    for name in ("unet", "text_encoder"):
        wide, narrow = shares[f"{name}/0.weight"], shares[f"{name}/1.weight"]
        assert wide < 0.4 < 0.6 < narrow  # three times as wide: fewer of its weights are small
        assert (wide + narrow) / 2 == pytest.approx(0.5, abs=1e-3)
    weight = draw(64, 96, seed=1)
    least = np.sort(np.abs(np.concatenate([(draw(64, 96) * 3).numpy().ravel(), weight.numpy().ravel()])))[64 * 96]
    found = dict(dequantized(FolderModel(tmp_path / "job/out/unet")))["1.weight"]
    assert torch.equal(found, weight * (weight.abs() >= least))


def test_a_component_that_is_not_there_is_named(tmp_path, base):
    (tmp_path / "two").mkdir()
    model = two_components(tmp_path / "two")
    with pytest.raises(UsageError, match=r"no component 'vae'; its components are text_encoder, unet"):
        run_plugin(Magnitude(), [model], tmp_path / "a", {"sparsity": "vae=0.3"})
    with pytest.raises(UsageError, match="wanda sees the inputs of a denoiser only; prune text_encoder"):
        run_plugin(Wanda(), [model], tmp_path / "b", {"sparsity": "unet=0.3,text_encoder=0.4"})
    with pytest.raises(UsageError, match=r"auto is of compressor\.magnitude alone"):
        run_plugin(Wanda(), [base], tmp_path / "c", {"sparsity": "auto"})


def test_the_plan_is_what_is_made_where_shapes_decide(tmp_path):
    (tmp_path / "two").mkdir()
    model, values = two_components(tmp_path / "two"), {"sparsity": "unet=0.35,text_encoder=0.475"}
    planned = plan(Magnitude, model, values)
    report = run_plugin(Magnitude(), [model], tmp_path / "job", values).report
    for name in ("bytes_before", "bytes_after", "quantized", "kept"):
        assert planned[name] == report[name]
    for blind in ({"sparsity": "auto"}, {"scope": "global"}):
        with pytest.raises(UsageError, match="the values of the weights decide"):
            plan(Magnitude, model, blind)


def test_wanda_loses_less_than_magnitude_where_little_is_pruned(base, tmp_path):
    # At 50 % they are level, at 70 % magnitude wins: see docs/compression.md.
    values = {"sparsity": 0.2, "fidelity": True}
    found = run_plugin(Wanda(), [base], tmp_path / "wanda", {**values, "pictures": 4, "steps": 4}).report
    plain = run_plugin(Magnitude(), [base], tmp_path / "magnitude", values).report
    assert found["bytes_after"] == pytest.approx(plain["bytes_after"], rel=0.01)
    assert found["fidelity"]["error"] < plain["fidelity"]["error"]
    layers = found["layers"]
    assert sum(layer["output_error"] < layer["output_error_magnitude"] for layer in layers) > 0.8 * len(layers)
