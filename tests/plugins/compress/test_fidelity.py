"""The error of a packed denoiser against arithmetic of its own, and in a compressor's report."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels.calls import recorded
from modelgrove_plugins.compress.comparing import MOST, seek
from modelgrove_plugins.compress.fidelity import Comparison, epsilon_error, psnr
from modelgrove_plugins.compress.rtn import Rtn
from modelgrove_plugins.preview.diffusers import open_painter


class Scaled(nn.Module):
    """factor · x for t < 500, x itself later."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, sample, timestep):
        return (sample * (self.factor if timestep < 500 else 1.0),)


def calls_of(network, times):
    generator = torch.Generator().manual_seed(0)
    with recorded(network) as calls:
        for time in times:
            network(torch.randn(2, 3, generator=generator), timestep=time)
    network(torch.zeros(2, 3), 1)  # no more is recorded
    return calls


def test_the_error_is_relative_to_the_energy_at_each_timestep_and_over_all():
    calls = calls_of(Scaled(1.0), [900, 100, 100])
    error = epsilon_error(Scaled(0.9), calls)
    energy = [float(call.output.square().sum()) for call in calls]
    assert [time for time, _ in error.by_timestep] == [100, 900]
    assert error.by_timestep[0][1] == pytest.approx(0.01, rel=1e-5)  # (1 - 0.9)², float32
    assert error.by_timestep[1][1] == 0
    assert error.overall == pytest.approx(0.01 * sum(energy[1:]) / sum(energy), rel=1e-5)


def test_no_calls_are_refused():
    with pytest.raises(ValueError, match="no calls"):
        epsilon_error(Scaled(1.0), [])


def test_psnr_is_that_of_all_pixels_together():
    black, grey = (Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 51))
    assert psnr([black, black], [black, black]) == math.inf
    assert psnr([black], [grey]) == pytest.approx(20 * math.log10(5))
    assert psnr([black, black], [black, grey]) == pytest.approx(20 * math.log10(5) + 10 * math.log10(2))


def compress(pipeline, folder, **params):
    return run_plugin(Rtn(), [pipeline], folder, {"smallest": 256, **params})


def test_more_bits_are_more_faithful_and_the_sheet_shows_both(pipeline, tmp_path):
    eight, four = (compress(pipeline, tmp_path / f"{bits}", bits=bits).report["fidelity"] for bits in (8, 4))
    assert 0 < eight["error"] < four["error"] / 10
    assert eight["psnr_db"] > four["psnr_db"] + 10
    assert 0 < eight["perceptual"] < four["perceptual"] / 3
    assert eight["frechet"] < four["frechet"]
    assert len(four["by_timestep"]) == four["steps"] == 8
    with Image.open(tmp_path / "4/out/sheet.png") as sheet, Image.open(tmp_path / "4/out/layers.png") as plot:
        # Two columns of two pictures, 128 pixels each, beside their labels.
        assert sheet.width > 4 * 128
        assert plot.height > 500


def test_the_error_is_that_of_the_unpacked_weights(pipeline, tmp_path):
    """Weights alone are packed here: the packed folder, opened like any other, answers with the same error."""
    report = compress(pipeline, tmp_path / "job", bits=4).report["fidelity"]
    original = Comparison(open_painter(pipeline, tmp_path / "a"), "unet")
    packed = open_painter(FolderModel(tmp_path / "job/out"), tmp_path / "b")
    error = epsilon_error(packed.networks["unet"], original.calls)
    # Unpacking rounds to the original's float16 once more: 2^-11 of a weight, where int4 is off by a tenth.
    assert error.overall == pytest.approx(report["error"], rel=0.02)
    assert [time for time, _ in error.by_timestep] == [time for time, _ in report["by_timestep"]]


def test_what_is_not_compared_says_why(pipeline, tmp_path):
    assert compress(pipeline, tmp_path / "a", fidelity=False).report["fidelity"] == {"reason": "it was not wanted"}
    bare = FolderModel(pipeline.files()["unet/config.json"].parent)
    assert "no pipeline" in compress(bare, tmp_path / "b", fidelity=True).report["fidelity"]["reason"]
    assert not (tmp_path / "a/out/sheet.png").exists()


def test_a_pipeline_that_cannot_be_opened_is_packed_all_the_same(pipeline, tmp_path):
    files = {path: file for path, file in pipeline.files().items() if not path.startswith("codec")}
    broken = FolderModel(pipeline.files()["model_index.json"].parent)
    object.__setattr__(broken, "paths", files)
    result = compress(broken, tmp_path / "job")
    assert "codec" in result.report["fidelity"]["reason"]
    assert result.report["quantized"] > 0
    assert result.artefacts == ("layers.png",)


def test_a_large_denoiser_is_compared_only_when_asked(pipeline):
    (tensor, *_) = (tensor for tensor in pipeline.tensors() if tensor.name.startswith("unet/"))
    tensor.shape = (MOST + 1,)
    assert f"{MOST + 1:,}" in seek(pipeline, [tensor], None).reason
    assert seek(pipeline, [tensor], True).component == "unet"
