import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from zoo_models import BASE, DATA

from modelgrove_analyzers.encoders.denoiser import open_denoiser
from modelgrove_analyzers.encoders.responses import responses
from modelgrove_hub.errors import CorruptFileError, UsageError
from modelgrove_hub.testing import FolderModel

WORDS = ("a", "red", "apple", "b", "o", "t", "<|startoftext|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A real StableDiffusionPipeline of real classes, only tiny and untrained."""
    torch.manual_seed(0)
    vocabulary = {word + end: i * 2 + j for i, word in enumerate(WORDS) for j, end in enumerate(("", "</w>"))}
    text_encoder = CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16),
        text_encoder=CLIPTextModel(text_encoder),
        tokenizer=CLIPTokenizer(
            vocabulary | {"<|startoftext|>": 98, "<|endoftext|>": 99}, [], model_max_length=77
        ),
        unet=UNet2DConditionModel(
            sample_size=64, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
            attention_head_dim=2, norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd")
    pipe.save_pretrained(folder)
    return pipe, folder


def test_stable_diffusion_reads_text_as_its_pipeline_does(stable_diffusion):
    pipe, folder = stable_diffusion
    denoiser = open_denoiser(FolderModel(folder))
    expected, _ = pipe.encode_prompt("a red apple", "cpu", 1, False)
    # The same classes on the same weights.
    torch.testing.assert_close(denoiser.states(["a red apple"]), expected)
    assert denoiser.latent_shape == (4, 16, 16)


def test_stable_diffusion_answers_words(stable_diffusion):
    denoiser = open_denoiser(FolderModel(stable_diffusion[1]))
    layer = "mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    found = responses(denoiser, ("a red apple", "a boat", "apple"), [layer])[layer]
    assert found.words.shape == (3, 16 * found.inputs.shape[1])
    assert found.words.isfinite().all()
    assert found.words.abs().max() > 0


def test_a_pipeline_without_its_text_encoder_is_told(stable_diffusion, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(stable_diffusion[1], folder, ignore=shutil.ignore_patterns("text_encoder"))
    with pytest.raises(UsageError, match="text encoder"):
        open_denoiser(FolderModel(folder))


def copied(tmp_path):
    shutil.copytree(DATA / "zoo-base", tmp_path / "base")
    return tmp_path / "base"


def test_the_zoos_base_is_opened_as_it_was_made():
    denoiser = open_denoiser(BASE)
    assert denoiser.latent_shape == (24, 8, 8)
    assert denoiser.alphas_cumprod.shape == (1000,)
    assert denoiser.states(["a cat", "two dogs"]).shape == (2, 16, 384)
    assert not any(parameter.requires_grad for parameter in denoiser.unet.parameters())


def test_a_pipeline_that_cannot_be_asked_is_named(tmp_path):
    folder = copied(tmp_path)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StrangePipeline"}))
    with pytest.raises(UsageError, match="StrangePipeline"):
        open_denoiser(FolderModel(folder))


def test_another_text_encoder_is_named(tmp_path):
    folder = copied(tmp_path)
    index = json.loads((folder / "model_index.json").read_text()) | {"text_encoder_name": "someone/else"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="someone/else"):
        open_denoiser(FolderModel(folder))


@pytest.mark.parametrize("content", ["[]", "{", "[" * 10_000])
def test_a_broken_configuration_is_refused(tmp_path, content):
    folder = copied(tmp_path)
    (folder / "unet/config.json").write_text(content)
    with pytest.raises(UsageError, match=r"unet/config\.json"):
        open_denoiser(FolderModel(folder))


def test_weights_of_another_network_are_refused(tmp_path):
    folder = copied(tmp_path)
    config = json.loads((folder / "unet/config.json").read_text()) | {"block_out_channels": [32, 64]}
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="unet"):
        open_denoiser(FolderModel(folder))
