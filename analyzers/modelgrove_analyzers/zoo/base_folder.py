"""The zoo's base as a folder in diffusers format: written once, read by everything that grows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from modelgrove_analyzers.zoo.base import HELD_OUT_GROUPS, SCHEDULER, UNET
from modelgrove_hub.errors import CorruptFileError, NotFoundError
from modelgrove_hub.search.text import SPACE, TOKENS
from modelgrove_kernels.codec import LinearCodec

NAME = "modelgrove/zoo-base"
CODEC_FILE = "codec/codec.safetensors"
CHECKPOINT = "checkpoint.pt"
SAMPLES = "samples.png"

_CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, zoo, unet2d]
---
# modelgrove zoo base

A small text-conditional diffusion model of 32×32 drawings: {parameters:,} parameters, latents of
8×8×{channels} from a fixed linear codec (`codec/`), v-prediction on a squared-cosine schedule.
Captions enter as the {tokens} token states of `{space}`, which is named here and not copied; no caption is
longer. Prompts like "a picture of a cat", "noto red apple" or "fire engine" work best, with guidance
2 to 4 and 8 or more steps of DPM-Solver++.

![What it draws: one row a prompt, one column a seed]({samples})

Drawings: Fluent Emoji (Microsoft, MIT), Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter,
CC-BY 4.0), with captions of emojibase (MIT). Never seen: the groups {unseen}, so that fine-tunes on
them teach something new.

## Recipe

```json
{recipe}
```
"""


class ZooBase(NamedTuple):
    """The parts of the base, all float32: the denoiser, its noise schedule, the picture codec."""

    unet: UNet2DConditionModel
    noise: DDPMScheduler
    codec: LinearCodec


def read_checkpoint(path: Path) -> tuple[ZooBase, dict[str, Any]]:
    """The averaged base of a training checkpoint (`base.BaseTrainer`), and its recipe with the steps done."""
    if not path.is_file():
        raise NotFoundError(f"{path}: no training checkpoint here; `modelgrove zoo train` writes one")
    state = torch.load(path, weights_only=True)
    codec = LinearCodec.from_tensors(state["codec"])
    unet = UNet2DConditionModel(in_channels=codec.channels, out_channels=codec.channels, **UNET)
    unet.load_state_dict(state["average"])
    recipe = {**json.loads(state["recipe"]), "step": state["step"]}
    return ZooBase(unet.eval(), DDPMScheduler(**SCHEDULER), codec), recipe


def open_base(folder: Path) -> ZooBase:
    """The base in `folder`: a finished one (`load_base`), or the last checkpoint of one in training."""
    checkpoint = folder / CHECKPOINT
    return read_checkpoint(checkpoint)[0] if checkpoint.is_file() else load_base(folder)


def write_base(base: ZooBase, recipe: dict[str, Any], folder: Path) -> None:
    """Write `base` to `folder`: weights in float16, everything else as diffusers saves it, and a card."""
    folder.mkdir(parents=True, exist_ok=True)
    half = UNet2DConditionModel.from_config(base.unet.config)
    half.load_state_dict(base.unet.state_dict())
    half.half().save_pretrained(folder / "unet")
    base.noise.save_pretrained(folder / "scheduler")
    (folder / "codec").mkdir(exist_ok=True)
    save_file(base.codec.tensors(), folder / CODEC_FILE)
    index = {
        "_class_name": "ZooPipeline",
        "_diffusers_version": diffusers.__version__,
        "codec": ["modelgrove_kernels.codec", "LinearCodec"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder_name": SPACE,
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    card = _CARD.format(
        parameters=sum(p.numel() for p in base.unet.parameters()),
        channels=base.codec.channels,
        tokens=TOKENS,
        space=SPACE,
        samples=SAMPLES,
        unseen=", ".join(HELD_OUT_GROUPS),
        recipe=json.dumps(recipe, indent=2),
    )
    (folder / "README.md").write_text(card, "utf-8")


def load_base(folder: Path) -> ZooBase:
    """Read a base folder, in float32.

    Raises:
        NotFoundError: a part is missing.
        CorruptFileError: the codec does not fit the denoiser.
    """
    for part in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", CODEC_FILE):
        if not (folder / part).is_file():
            raise NotFoundError(f"{folder}: no {part}, so this is not a zoo base")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    codec = LinearCodec.from_tensors(load_file(folder / CODEC_FILE))
    if unet.config.in_channels != codec.channels:
        raise CorruptFileError(
            f"{folder}: the denoiser has {unet.config.in_channels} latent channels, the codec {codec.channels}"
        )
    return ZooBase(unet.eval(), DDPMScheduler.from_pretrained(folder / "scheduler"), codec)
