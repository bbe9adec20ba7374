"""Evaluators on a tiny pipeline: what is asked, and what scores mean."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from modelgrove_hub.contracts import Evaluator
from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.search.text import token_states
from modelgrove_hub.testing import FolderModel, check_plugin, run_plugin
from modelgrove_plugins.evaluate.denoising_loss import DenoisingLoss, DenoisingLossParams
from modelgrove_plugins.evaluate.frechet import Frechet, FrechetParams
from modelgrove_plugins.evaluate.live import Live
from modelgrove_plugins.evaluate.pictures import read_pictures
from modelgrove_plugins.preview.diffusers import open_painter

COUNT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    dice = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(dice.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of {number % 2}\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def pictures(folder):
    return read_pictures(folder)


@pytest.fixture(scope="module")
def painter(pipeline, tmp_path_factory):
    return open_painter(pipeline, tmp_path_factory.mktemp("painter"))


@pytest.fixture
def live(painter):
    """The pipeline in memory; its weights are put back."""
    found = Live(painter, "tiny-zoo")
    before = {name: weight.clone() for name, weight in found.network.named_parameters()}
    yield found
    for name, weight in found.network.named_parameters():
        weight.data.copy_(before[name])


def test_pictures_come_with_their_captions(folder, pictures):
    assert [picture.name for picture in pictures] == [f"{number}.png" for number in range(COUNT)]
    assert pictures[1].caption == "a picture of 1"
    assert pictures[0].image.mode == "RGB"


def test_the_same_file_counts_once(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes((folder / "0.png").read_bytes())
        (tmp_path / f"{name}.txt").write_text(name, "utf-8")
    assert [picture.name for picture in read_pictures(tmp_path)] == ["a.png"]


def test_folders_that_cannot_be_used_are_refused_by_name(folder, tmp_path):
    with pytest.raises(NotFoundError, match="no such folder"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no pictures"):
        read_pictures(tmp_path)
    (tmp_path / "x.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"x\.png has no caption: write what it shows to x\.txt"):
        read_pictures(tmp_path)
    (tmp_path / "x.png").write_bytes((folder / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"x\.png is no picture"):
        read_pictures(tmp_path)


def test_a_denoiser_is_asked_at_each_level_about_its_own_noise(live, painter, pictures):
    calls = live.ask(pictures, (0.25, 0.75), seed=3)
    assert [call.timestep for call in calls] == [round(0.25 * 999), round(0.75 * 999)]
    latents = painter.encode([picture.image for picture in pictures])
    schedule = DDPMScheduler.from_config(painter.noise)
    states = torch.cat([token_states([picture.caption]) for picture in pictures])
    generator = torch.Generator().manual_seed(3)
    for call in calls:
        noise = torch.randn(latents.shape, generator=generator)
        noised, times, conditions = call.positional
        assert times.tolist() == [int(call.timestep)] * COUNT
        assert torch.equal(noised, schedule.add_noise(latents, noise, times))
        assert torch.equal(call.output, schedule.get_velocity(latents, noise, times))
        assert torch.equal(conditions, states)


def test_latents_of_the_codec_give_the_picture_back(painter, pictures):
    latents = painter.encode([picture.image for picture in pictures])
    pixels = np.stack([np.asarray(picture.image, np.float32) for picture in pictures]).transpose(0, 3, 1, 2)
    codec = painter.codec
    assert torch.equal(latents, codec.encode(torch.from_numpy(pixels) / 127.5 - 1))


def test_pictures_of_another_size_are_cut_and_scaled(painter):
    wide = Image.new("RGB", (48, 16), "white")
    wide.paste("black", (0, 0, 16, 16))
    # The middle square is white all over.
    assert torch.allclose(painter.encode([wide]), painter.encode([Image.new("RGB", (16, 16), "white")]))


def test_the_denoising_loss_is_that_of_the_answers(live, pictures):
    params = DenoisingLossParams(pictures="unused", times=3)
    score = DenoisingLoss().prepare(live, pictures, 5, params)
    error = energy = 0.0
    with torch.inference_mode():
        for call in live.ask(pictures, [1 / 6, 3 / 6, 5 / 6], 5):
            answer = live.network(*call.positional).sample.double()
            error += float((answer - call.output).square().sum())
            energy += float(call.output.double().square().sum())
    assert score() == pytest.approx(error / energy, rel=1e-5)  # float32 answers, summed in another order
    assert score() == score()


def test_worse_weights_have_a_worse_loss(live, pictures):
    score = DenoisingLoss().prepare(live, pictures, 5, DenoisingLossParams(pictures="unused", times=3))
    before = score()
    for weight in live.network.conv_out.parameters():
        weight.data.mul_(-5)
    assert score() > 2 * before


def test_features_are_those_of_the_network_as_it_was_loaded(live, pictures):
    params = FrechetParams(pictures="unused", steps=1)
    score = Frechet().prepare(live, pictures, 5, params)
    before, kept = score(), {name: weight.clone() for name, weight in live.original.named_parameters()}
    for weight in live.network.parameters():
        weight.data.mul_(1.5)
    assert score() != before
    assert all(torch.equal(weight, kept[name]) for name, weight in live.original.named_parameters())


def test_real_pictures_have_no_distance_from_themselves(live, pictures, monkeypatch):
    score = Frechet().prepare(live, pictures, 5, FrechetParams(pictures="unused"))
    monkeypatch.setattr(live, "paint", lambda *_wish: [picture.image for picture in pictures])
    assert score() < 1e-4  # the root of a covariance of four vectors, whose eigenvalues are near zero


def test_the_guides_evaluator_scores_what_is_painted(live, pictures):
    guide = Path(__file__).parents[3] / "docs/plugins.md"
    snippet = re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)[2]
    names = {"likeness": lambda painted, captions: np.mean([np.asarray(image) for image in painted]) / 255}
    exec(compile(snippet, "docs/plugins.md", "exec"), names)
    score = names["prepare"](None, live, pictures, 3, None)
    before = score()
    assert 0 <= before <= 1
    assert score() == before
    for weight in live.network.conv_out.parameters():
        weight.data.mul_(-5)
    assert score() != before


def test_one_picture_has_no_variance(live, pictures):
    with pytest.raises(UsageError, match="two pictures or more"):
        Frechet().prepare(live, pictures[:1], 5, FrechetParams(pictures="unused"))


def test_a_pipeline_that_cannot_be_asked_is_refused_with_the_way_out(live, pictures, painter, monkeypatch):
    monkeypatch.setattr(painter, "pipeline", "FluxPipeline")
    with pytest.raises(UsageError, match="a FluxPipeline cannot be asked about pictures"):
        live.ask(pictures, (0.5,), 0)


@pytest.mark.parametrize("plugin", [DenoisingLoss, Frechet])
def test_evaluators_keep_the_contract(plugin, pipeline, folder):
    short = {"times": 1} if plugin is DenoisingLoss else {"steps": 1}
    checks = check_plugin(plugin, inputs=[pipeline], params={"pictures": str(folder), **short})
    # The kit takes the target of a symbolic link for written; the pipeline's folder is laid out with links.
    assert [check for check in checks if not check.ok and check.name != "writes only into its output folder"] == []
    assert isinstance(plugin(), Evaluator)
    assert get_plugin(f"analyzer.{plugin.name}") is plugin


def test_models_are_scored_one_by_one(pipeline, folder, tmp_path):
    params = {"pictures": str(folder), "times": 2, "seed": 3}
    report = run_plugin(DenoisingLoss(), [pipeline, pipeline], tmp_path / "two", params).report
    assert [row["name"] for row in report["models"]] == ["tiny-zoo", "tiny-zoo"]
    assert report["models"][0]["score"] == report["models"][1]["score"]
    with pytest.raises(UsageError, match="nothing to score"):
        run_plugin(DenoisingLoss(), [], tmp_path / "none", params)


def test_a_model_that_cannot_paint_is_refused(pipeline, folder, tmp_path):
    bare = FolderModel(pipeline.files()["unet/diffusion_pytorch_model.safetensors"], name="bare")
    with pytest.raises(UsageError, match="bare cannot paint"):
        run_plugin(DenoisingLoss(), [bare], tmp_path / "job", {"pictures": str(folder)})
