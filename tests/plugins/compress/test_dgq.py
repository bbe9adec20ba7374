"""DGQ as a plugin: the axis of outliers, and attention to the caption."""

import pytest
import torch

from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.testing import run_plugin
from modelgrove_kernels.calibration import LayerInputs
from modelgrove_plugins.compress.dgq import Dgq, DgqParams, grouped
from modelgrove_plugins.compress.packed import pack
from modelgrove_plugins.compress.q_diffusion import QDiffusion

FILE = "out/unet/diffusion_pytorch_model.safetensors"
VALUES = {"smallest": 256, "pictures": 4, "steps": 4}
PARAMS = DgqParams(activation_bits=6)


def packed(pipeline, folder, **values):
    report = run_plugin(Dgq(), [pipeline], folder, {**VALUES, **values}).report
    return report, manifest_of(folder / FILE)


def seen(rows):
    inputs = LayerInputs.none(rows.shape[1])
    inputs.add(rows)
    return inputs


def layer(shape=(16, 32)):
    return pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 8, None)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_outliers_of_channels_get_groups_of_channels():
    rows = noise(200, 32)
    rows[:, 5] *= 50
    found = grouped(layer(), seen(rows), PARAMS)
    assert found.remarks["axis"] == "channels"
    assert (found.entry.activations.ranges, found.entry.activations.groups) == ("static", 8)
    assert int((found.parts["channels"] == found.parts["channels"][5]).sum()) == 1
    low, high = found.parts["ranges"][0, int(found.parts["channels"][5])]
    assert float(low) == pytest.approx(float(rows[:, 5].min()), rel=0.5)
    assert float(high) == pytest.approx(float(rows[:, 5].max()), rel=0.5)
    assert found.entry.bytes == sum(part.nbytes for part in found.parts.values())


def test_outliers_of_pixels_get_a_scale_each():
    rows = noise(200, 32) * 10 ** noise(200, 1)
    found = grouped(layer(), seen(rows), PARAMS)
    assert found.remarks["axis"] == "pixels"
    assert (found.entry.activations.ranges, found.entry.activations.groups) == ("token", 1)
    assert "ranges" not in found.parts


def test_a_convolution_has_channels_whatever_its_pixels_do():
    rows = noise(200, 4 * 9) * 10 ** noise(200, 1)
    found = grouped(layer((8, 4, 3, 3)), seen(rows), PARAMS)
    assert found.remarks["axis"] == "channels"
    assert found.parts["channels"].shape == (4,)


def test_inputs_that_are_not_finite_are_refused():
    rows = noise(20, 32)
    rows[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        grouped(layer(), seen(rows), PARAMS)


def test_groups_lose_less_than_one_range_for_all(pipeline, tmp_path):
    # Ranges of few pictures do not hold for others.
    values = {**VALUES, "pictures": 16, "bits": 8, "activation_bits": 4}
    found = packed(pipeline, tmp_path / "dgq", **values, attention=False)[0]["fidelity"]["error"]
    plain = run_plugin(QDiffusion(), [pipeline], tmp_path / "static", {**values, "iterations": 0}).report
    assert found < 0.9 * plain["fidelity"]["error"]


def test_cross_attention_is_rounded_and_the_comparison_sees_it(pipeline, tmp_path):
    report, manifest = packed(pipeline, tmp_path / "rounded", activation_bits=4, bits=8)
    plain, _ = packed(pipeline, tmp_path / "plain", activation_bits=4, bits=8, attention=False)
    wanted = {name: entry.attention for name, entry in manifest.tensors.items() if entry.attention}
    assert report["attention"]["layers"] == len(wanted) == 4
    assert all(name.endswith("attn2.to_v.weight") for name in wanted)
    assert all(one.bits == 4 for one in wanted.values())
    assert report["fidelity"]["error"] != plain["fidelity"]["error"]
    assert plain["attention"] == {"reason": "it was not wanted"}


def test_a_network_without_captions_says_so(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("modelgrove_plugins.compress.attention.cross_attentions", lambda _network: {})
    report, manifest = packed(pipeline, tmp_path, fidelity=False)
    assert "no attention to a caption" in report["attention"]["reason"]
    assert not any(entry.attention for entry in manifest.tensors.values())
