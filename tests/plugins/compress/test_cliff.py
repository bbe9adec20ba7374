"""The cliff finder on curves whose answer is known, and `--sparsity auto` on networks."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.cliff import GRID, choose, find_cliff
from modelgrove_plugins.compress.magnitude import CLIFF, Magnitude
from modelgrove_plugins.compress.picture import plot_sweeps


def smooth(share):
    """What dropping the smallest of normally distributed weights does: the energy below the quantile, about s³."""
    return share**3


@pytest.mark.parametrize("edge", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("factor", [4, 100])
def test_a_planted_cliff_is_found_where_it_is(edge, factor):
    curve = [(share, smooth(share) * (factor if share > edge else 1)) for share in GRID]
    assert find_cliff(curve) == edge


@pytest.mark.parametrize(
    "grow", [smooth, lambda share: 1e-3 * math.exp(12 * share), lambda share: 0.2 * share, lambda _share: 0.1]
)
def test_smooth_growth_has_no_cliff(grow):
    assert find_cliff([(share, grow(share)) for share in GRID]) is None


def test_noise_of_a_tenth_is_no_cliff():
    noise = torch.rand(len(GRID), generator=torch.Generator().manual_seed(0)) * 0.2 + 0.9
    assert find_cliff([(share, smooth(share) * float(k)) for share, k in zip(GRID, noise, strict=True)]) is None


def test_of_two_cliffs_the_steeper_counts():
    curve = [(share, smooth(share) * (4 if share > 0.3 else 1) * (50 if share > 0.6 else 1)) for share in GRID]
    assert find_cliff(curve) == 0.6


def test_errors_of_zero_are_no_reason_to_fail():
    assert find_cliff([(share, 0.0) for share in GRID]) is None


def test_the_operating_point_is_within_the_tolerance_and_before_the_cliff():
    curve = [(0.1, 0.001), (0.2, 0.01), (0.3, 0.015), (0.4, 0.05), (0.5, 0.012)]
    assert choose(curve, None, 0.02) == 0.3  # 0.5 lies behind what is too much
    assert choose(curve, 0.2, 0.02) == 0.2
    assert choose(curve, None, 1e-4) is None


def test_the_plot_has_a_line_for_each_component_and_one_where_it_is_pruned():
    curves = {"unet": [(0.1, 1e-3), (0.85, 1e-1)], "text_encoder": [(0.1, 1e-2), (0.85, 1.0)]}
    blue = (76, 120, 168)
    with_line, without = (plot_sweeps(curves, chosen) for chosen in ({"unet": 0.475}, {}))
    middle = 64 + (960 - 64 - 16) // 2

    def column(picture):
        return sum(picture.getpixel((middle, y)) == blue for y in range(30, 214))

    assert column(with_line) > 150
    assert column(without) < 10


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A tiny untrained Stable Diffusion pipeline, with a text encoder of its own."""
    torch.manual_seed(0)
    words = {f"{letter}{end}": i * 2 + j for i, letter in enumerate("abcd") for j, end in enumerate(("", "</w>"))}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
            )
        ),
        tokenizer=CLIPTokenizer(words | {"<|startoftext|>": 98, "<|endoftext|>": 99}, [], model_max_length=77),
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
            norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd") / "model"
    pipe.save_pretrained(folder)
    return FolderModel(folder, name="tiny-sd", family="sd1")


def test_auto_prunes_text_encoder_and_denoiser_by_shares_of_their_own(sd, tmp_path):
    values = {"sparsity": "auto", "tolerance": 0.05, "smallest": 256, "fidelity": False}
    result = run_plugin(Magnitude(), [sd], tmp_path / "job", values)
    sweeps = result.report["sweeps"]
    assert set(sweeps) == {"unet", "text_encoder"}
    manifest = manifest_of(tmp_path / "job/out/unet/diffusion_pytorch_model.safetensors")
    said = dict(part.split("=") for part in manifest.parameters["sparsity"].split(","))
    for name, found in sweeps.items():
        assert [share for share, _ in found["curve"]] == list(GRID)
        assert float(said[name]) == found["chosen"]
        shares = {layer["sparsity"] for layer in result.report["layers"] if layer["name"].startswith(f"{name}/")}
        assert all(share == pytest.approx(found["chosen"], abs=0.01) for share in shares)
    with Image.open(tmp_path / "job/out" / CLIFF) as plot:
        assert plot.width == 960
    assert CLIFF in result.artefacts


def test_the_curve_is_the_error_of_the_model_that_is_written(pipeline, tmp_path):
    """The sweep's pruned copy in memory, against the comparison of the written file on other seeds."""
    values = {"smallest": 256, "fidelity": True, "scope": "global"}
    swept = run_plugin(Magnitude(), [pipeline], tmp_path / "auto", {**values, "sparsity": "auto", "tolerance": 0.5})
    found = swept.report["sweeps"]["unet"]
    again = run_plugin(Magnitude(), [pipeline], tmp_path / "again", {**values, "sparsity": found["chosen"]})
    assert swept.report["fidelity"] == again.report["fidelity"]
    # The same prompts with other noise: an untrained network answers much alike.
    assert dict(found["curve"])[found["chosen"]] == pytest.approx(swept.report["fidelity"]["error"], rel=0.5)


def test_a_tolerance_that_nothing_meets_is_refused(pipeline, tmp_path):
    with pytest.raises(UsageError, match=r"at 10% already more than the tolerance 1e-09 is lost \(unet: "):
        run_plugin(Magnitude(), [pipeline], tmp_path, {"sparsity": "auto", "tolerance": 1e-9, "smallest": 256})
