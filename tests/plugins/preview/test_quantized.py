"""Previews on quantized kernels look like those in full precision, with adapters beside the codes."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import Factors
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.testing import FolderModel, LocalContext
from modelgrove_kernels.layouts import layout_of
from modelgrove_kernels.modules import QuantConv2d, QuantLinear
from modelgrove_plugins.compress.packed import pack
from modelgrove_plugins.compress.rtn import Rtn, RtnParams
from modelgrove_plugins.preview.diffusers import open_painter
from modelgrove_plugins.preview.fusing import fuse
from modelgrove_plugins.preview.quantized import quantize_painter


@pytest.fixture
def packed(zoo, tmp_path):
    with LocalContext(tmp_path / "rtn", [zoo]) as context:
        Rtn().run(context, RtnParams(bits=4, group_size=32, smallest=0, fidelity=False))
    return FolderModel(tmp_path / "rtn/out", name="packed-zoo", family="zoo")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(painter):
    """The network's output for one fixed input."""
    width = painter.unet.config.cross_attention_dim
    with torch.inference_mode():
        return painter.unet(draw(2, 6, 4, 4), torch.tensor(500), draw(2, 3, width, seed=1)).sample


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("quant", "most"), [("w8a8", 0.05), ("w4a8", 0.35)])
def test_weights_are_rounded_for_the_preview(zoo, tmp_path, quant, most):
    painter = open_painter(zoo, tmp_path / "pipeline")
    wanted = answer(painter)
    report = quantize_painter(painter, zoo, quant)
    assert 0 < off(answer(painter), wanted) < most
    swapped = [m for m in painter.unet.modules() if isinstance(m, QuantLinear | QuantConv2d)]
    assert report["layers"] == len(swapped) > 0
    assert isinstance(painter.unet.conv_in, nn.Conv2d)
    assert isinstance(painter.unet.conv_out, nn.Conv2d)


def test_a_packed_model_is_computed_from_its_own_codes(packed, tmp_path):
    painter = open_painter(packed, tmp_path / "pipeline")
    wanted = answer(painter)  # the weights unpacked, in full precision
    report = quantize_painter(painter, packed, "packed")
    assert report["layers"] > 20
    # Only the activations are rounded, to 8 bits.
    assert 0 < off(answer(painter), wanted) < 0.05


def test_an_adapter_becomes_a_branch_and_changes_what_it_changes_unquantized(packed, lora, tmp_path):
    plain, fast = (open_painter(packed, tmp_path / name) for name in ("plain", "fast"))
    quantize_painter(fast, packed, "packed")
    before, adapter = answer(plain), open_updates(lora("style", size=3.0))
    reports = [fuse(painter.networks, adapter, 0.8) for painter in (plain, fast)]
    assert reports[0] == reports[1]
    moved = answer(plain) - before
    assert off(answer(fast), answer(plain)) < 0.25 * float(moved.norm() / answer(plain).norm())


def test_a_convolution_takes_an_adapter_as_its_weight_would():
    layer, x = nn.Conv2d(8, 12, 3, padding=1).requires_grad_(False), draw(1, 8, 5, 5)
    stored = pack(layer.weight, 8, None)
    quantized = QuantConv2d(layer, layout_of(stored.entry), stored.parts)
    factors = Factors("conv", "unet", (3, 3), draw(2, 72, seed=2), draw(12, 2, seed=3))
    found = quantized(x)
    quantized.add_branch(factors.down, factors.up)
    wanted = nn.functional.conv2d(x, (factors.up @ factors.down).view(12, 8, 3, 3), padding=1)
    torch.testing.assert_close(quantized(x) - found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quant", ["w8a8", "w4a8"])
def test_a_packed_model_is_not_rounded_again(packed, tmp_path, quant):
    with pytest.raises(UsageError, match="--quant packed"):
        quantize_painter(open_painter(packed, tmp_path / "pipeline"), packed, quant)


def test_a_model_that_is_not_packed_says_so(zoo, tmp_path):
    with pytest.raises(UsageError, match="is not packed"):
        quantize_painter(open_painter(zoo, tmp_path / "pipeline"), zoo, "packed")


def test_an_adapter_of_another_width_is_refused(tmp_path):
    weight = draw(16, 64)
    stored = pack(weight, 4, 32)
    network = nn.ModuleDict({"to_q": QuantLinear(layout_of(stored.entry), stored.parts)})
    tensors = {"unet.to_q.lora_A.weight": draw(2, 32), "unet.to_q.lora_B.weight": draw(16, 2)}
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(DataError, match=r"\(16, 32\), the layer's weight \(16, 64\)"):
        fuse({"unet": network}, open_updates(FolderModel(tmp_path / "style.safetensors")), 1.0)


def test_a_whole_difference_cannot_stand_beside_codes_and_the_way_out_is_told(tmp_path):
    stored = pack(draw(16, 64), 4, 32)
    network = nn.ModuleDict({"to_q": QuantLinear(layout_of(stored.entry), stored.parts)})
    save_file({"unet.to_q.diff": draw(16, 64)}, tmp_path / "full.safetensors")
    with pytest.raises(UsageError, match="without --quant"):
        fuse({"unet": network}, open_updates(FolderModel(tmp_path / "full.safetensors")), 1.0)


def test_the_report_of_a_preview_says_what_was_quantized(zoo, paint):
    _, report = paint(zoo, steps=2, quant="w8a8")
    assert report["quantized"]["component"] == "unet"
    assert 20 < report["quantized"]["layers"] < report["quantized"]["of"]
