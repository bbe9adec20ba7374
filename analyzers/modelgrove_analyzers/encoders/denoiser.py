"""A registered base that can be asked: its denoiser, and how it reads text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import UsageError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

_INDEX = "model_index.json"
_UNET = "unet/"
_TEXT_SIDE = ("tokenizer", "text_encoder")
_DATA = (".json", ".txt", ".safetensors")
_LARGEST_JSON = 1 << 20
_LARGEST_SIDE = 16
"""Latents larger than this say little more of a word and cost much more."""


@dataclass(frozen=True)
class Denoiser:
    """A UNet in float32, its noise schedule's ᾱ (T,), and the states (n, tokens, d) that it reads for n texts."""

    unet: UNet2DConditionModel
    alphas_cumprod: Tensor
    states: Callable[[Sequence[str]], Tensor]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents to ask with."""
        side = min(int(self.unet.config.sample_size), _LARGEST_SIDE)
        return int(self.unet.config.in_channels), side, side


def open_denoiser(base: InputModel) -> Denoiser:
    """The denoiser of a diffusers folder: the zoo's, or a Stable Diffusion 1 or 2.

    Raises:
        UsageError: the folder is no pipeline that can be asked here, or lacks a part.
        DataError: the denoiser's configuration or weights break the rules.
    """
    from diffusers import DDPMScheduler

    from modelgrove_hub.formats.unets import build_unet

    index = _read_json(base, _INDEX)
    readers = {"ZooPipeline": _zoo_states, "StableDiffusionPipeline": _clip_states}
    read = readers.get(str(index.get("_class_name")))
    if read is None:
        raise UsageError(f"{base.name}: {index.get('_class_name')} is not asked for words; {', '.join(readers)} can be")
    states = read(base, index)
    tensors = {tensor.key: tensor.read() for tensor in base.tensors() if tensor.file.startswith(_UNET)}
    unet = build_unet(_read_json(base, f"{_UNET}config.json"), tensors)
    noise = DDPMScheduler.from_config(_read_json(base, "scheduler/scheduler_config.json"))
    return Denoiser(unet, noise.alphas_cumprod, states)


def _zoo_states(base: InputModel, index: dict[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    from modelgrove_hub.search.text import SPACE, token_states

    encoder = index.get("text_encoder_name", SPACE)
    if encoder != SPACE:
        raise UsageError(f"{base.name}: text encoder {encoder!r} is not here, only {SPACE!r}")
    return token_states


def _clip_states(base: InputModel, _index: dict[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    """As `StableDiffusionPipeline.encode_prompt` does it; only JSON, text and safetensors are read."""
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    with TemporaryDirectory() as place:
        for path, source in base.files().items():
            part, _, name = path.partition("/")
            if part in _TEXT_SIDE and "/" not in name and name.endswith(_DATA):
                (Path(place) / part).mkdir(exist_ok=True)
                (Path(place) / part / name).symlink_to(source.absolute())
        try:
            tokenizer = CLIPTokenizer.from_pretrained(f"{place}/tokenizer", local_files_only=True)
            encoder = CLIPTextModel.from_pretrained(
                f"{place}/text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{base.name}: its text encoder cannot be opened, so it is not asked: {error}") from error

    def states(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            found: Tensor = encoder(tokens.input_ids).last_hidden_state
        return found

    return states


def _read_json(base: InputModel, path: str) -> dict[str, Any]:
    file = base.files().get(path)
    try:
        content = json.loads(file.read_bytes()) if file and file.stat().st_size <= _LARGEST_JSON else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{base.name}: {path} is missing or no JSON object, so the base cannot be asked")
    return content
