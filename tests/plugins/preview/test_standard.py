"""A real StableDiffusionPipeline of real classes, only tiny and untrained."""

import inspect
import io
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from modelgrove_hub.contracts import Picture
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.testing import FolderModel
from modelgrove_plugins.evaluate.live import Live
from modelgrove_plugins.preview.diffusers import PreviewParams, open_painter
from modelgrove_plugins.preview.standard import PIPELINES

WORDS = ("a", "red", "apple", "b", "o", "t", "<|startoftext|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    vocabulary = {word + end: i * 2 + j for i, word in enumerate(WORDS) for j, end in enumerate(("", "</w>"))}
    vocabulary |= {"<|startoftext|>": 98, "<|endoftext|>": 99}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            )
        ),
        tokenizer=CLIPTokenizer(vocabulary, [], model_max_length=77),
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
            norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def sd(sd_folder):
    return FolderModel(sd_folder, name="tiny-sd", family="sd1")


def pixels(png):
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_standard_pipeline_paints_the_same_bytes_again(sd, paint):
    first, report = paint(sd, prompts=["a red apple", "a boat"], images=3, scale=1)

    assert first == paint(sd, prompts=["a red apple", "a boat"], images=3, scale=1)[0]
    assert pixels(first).shape == (2 * 16 + 4, 3 * 16 + 2 * 4, 3)
    assert report["recipe"]["pipeline"] == "StableDiffusionPipeline"
    assert report["recipe"]["scheduler"] == "DPMSolverMultistepScheduler"


def test_side_makes_larger_pictures(sd, paint):
    assert pixels(paint(sd, side=32, scale=1)[0]).shape == (32, 32, 3)


def test_loras_of_unet_and_text_encoder_are_fused(sd, paint, tmp_path):
    generator = torch.Generator().manual_seed(0)
    layers = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
        "unet.down_blocks.1.attentions.0.proj_in": (16, 16),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    }
    tensors = {}
    for name, (out, width) in layers.items():
        kernel = (1, 1) if "proj_in" in name else ()
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, width, *kernel, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, *kernel, generator=generator)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora/pytorch_lora_weights.safetensors")

    png, report = paint(sd, FolderModel(tmp_path / "lora", adapter_type="lora"))

    assert report["adapters"][0]["matched"] == report["adapters"][0]["modules"] == 3
    assert (pixels(png) != pixels(paint(sd)[0])).any()


def test_a_folder_with_only_half_precision_files_is_read(sd_folder, sd, paint, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")

    assert (pixels(paint(FolderModel(tmp_path / "half"))[0]) == pixels(paint(sd)[0])).all()


def test_code_and_pickles_of_the_folder_are_never_reached(sd_folder, paint, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "sly")
    for name in ("pipeline.py", "unet/modeling_unet.py", "unet/diffusion_pytorch_model.bin"):
        (tmp_path / "sly" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    paint(FolderModel(tmp_path / "sly"))

    assert not (tmp_path / "ran").exists()


def test_a_component_of_another_library_is_refused(sd_folder, paint, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "sly")
    index = json.loads((tmp_path / "sly/model_index.json").read_text())
    (tmp_path / "sly/model_index.json").write_text(json.dumps(index | {"unet": ["os", "system"]}))

    with pytest.raises(DataError, match="component 'unet' comes from"):
        paint(FolderModel(tmp_path / "sly"))


def test_an_unknown_class_is_refused_with_those_that_are_known(sd_folder, paint, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "video")
    index = json.loads((tmp_path / "video/model_index.json").read_text())
    (tmp_path / "video/model_index.json").write_text(json.dumps(index | {"_class_name": "CogVideoXPipeline"}))

    with pytest.raises(UsageError, match="'CogVideoXPipeline' cannot be previewed; known are StableDiffusionPipeline"):
        paint(FolderModel(tmp_path / "video"))


def test_missing_weights_are_the_files_fault(sd_folder, paint, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "hollow")
    (tmp_path / "hollow/unet/diffusion_pytorch_model.safetensors").unlink()

    with pytest.raises(DataError, match="StableDiffusionPipeline does not load"):
        paint(FolderModel(tmp_path / "hollow"))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_known_class_takes_what_the_previewer_gives(name):
    known = inspect.signature(getattr(diffusers, name).__call__).parameters

    assert {"prompt", "num_inference_steps", "guidance_scale", "generator", "height", "output_type"} <= known.keys()


def test_a_denoiser_is_asked_about_pictures_as_the_pipeline_calls_it(sd, tmp_path):
    """Latents by the autoencoder, noise on the pipeline's schedule, states of the captions beside them."""
    painter = open_painter(sd, tmp_path / "laid-out")
    images = [Image.new("RGB", (24, 16), colour) for colour in ("red", "white")]
    pictures = [Picture(f"{text}.png", text, image) for text, image in zip(("red", "a"), images, strict=True)]
    [call] = Live(painter, "tiny-sd").ask(pictures, (0.5,), 0)
    pipe = painter.pipe
    with torch.inference_mode():
        pixels = torch.cat([pipe.image_processor.preprocess(image.crop((4, 0, 20, 16))) for image in images])
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        states = pipe.encode_prompt(["red", "a"], "cpu", 1, False)[0]
        found = pipe.unet(*call.positional, **call.named)[0]
        wanted = pipe.unet(call.positional[0], 500, states).sample
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    share = pipe.scheduler.alphas_cumprod[500]
    # One picture after the other against both at once.
    assert torch.allclose(call.positional[0], share.sqrt() * latents + (1 - share).sqrt() * noise, atol=1e-5)
    assert torch.equal(call.output, noise)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_style_tokens_take_the_last_places_of_what_the_text_encoder_says(sd, tmp_path):
    painter = open_painter(sd, tmp_path / "laid-out")
    row = torch.full((1, 16), 2.0)
    painter.tokens["monet"] = row
    found = []

    def hear(_unet, _positional, named):
        found.append(named["encoder_hidden_states"])

    heard = painter.pipe.unet.register_forward_pre_hook(hear, with_kwargs=True)
    params = PreviewParams(prompts=("red",), steps=1, guidance_scale=4, negative_prompt="a <monet>")
    painter.paint([("red <monet>", 0), ("red", 0)], params, lambda _done: None)
    heard.remove()
    with torch.inference_mode():
        plain = painter.pipe.encode_prompt(["red", "a <monet>"], "cpu", 1, False)[0]
    negative, other, spoken, unspoken = found[0]
    assert torch.equal(spoken, torch.cat([plain[0, :-1], row]))
    assert torch.equal(unspoken, plain[0])
    # Encoded together with other prompts.
    assert torch.allclose(negative, plain[1], atol=1e-5)
    assert torch.equal(negative, other)
