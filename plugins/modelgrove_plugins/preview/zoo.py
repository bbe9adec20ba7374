"""Paint with the zoo's own pipeline: a small UNet on linear latents, captions by MiniLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from modelgrove_hub.errors import CorruptFileError, DataError
from modelgrove_hub.formats.style_tokens import place_rows, split_prompt
from modelgrove_hub.formats.unets import build_unet
from modelgrove_hub.search.text import SPACE, token_states
from modelgrove_kernels.codec import LinearCodec
from modelgrove_plugins.preview.painter import Wish, batches, make_scheduler

if TYPE_CHECKING:
    from modelgrove_plugins.preview.diffusers import PreviewParams

_BATCH = 64


@dataclass
class ZooPainter:
    """The zoo's UNet, noise schedule and codec, in float32."""

    unet: UNet2DConditionModel
    noise: Mapping[str, Any]
    codec: LinearCodec
    pipeline: str = "ZooPipeline"
    scheduler: str = ""
    tokens: dict[str, Tensor] = field(default_factory=dict)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Component name → network."""
        return {"unet": self.unet}

    def swap(self, component: str, network: nn.Module) -> None:
        """Paint with another network; the UNet is the only one."""
        setattr(self, component, network)

    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Latents by the linear codec."""
        side = self.unet.config.sample_size * self.codec.patch
        pixels = np.stack([np.asarray(ImageOps.fit(picture, (side, side))) for picture in pictures])
        return self.codec.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)

    @classmethod
    def load(cls, folder: Path, index: Mapping[str, Any]) -> ZooPainter:
        """Read `unet/`, `scheduler/` and `codec/codec.safetensors`.

        Raises:
            DataError: a part is missing, or made for another text encoder.
        """
        from diffusers import DDPMScheduler

        encoder = index.get("text_encoder_name", SPACE)
        if encoder != SPACE:
            raise DataError(f"{folder.name}: text encoder {encoder!r} is not here, only {SPACE!r}")
        for part in ("unet/config.json", "scheduler/scheduler_config.json", "codec/codec.safetensors"):
            if not (folder / part).exists():
                raise DataError(f"the zoo pipeline has no {part}")
        try:
            codec = LinearCodec.from_tensors(load_file(folder / "codec/codec.safetensors"))
        except (KeyError, ValueError) as error:
            raise CorruptFileError(f"codec/codec.safetensors: {error}") from error
        return cls(_load_unet(folder / "unet"), DDPMScheduler.load_config(folder / "scheduler"), codec)

    @torch.inference_mode()
    def paint(
        self, wishes: Sequence[Wish], params: PreviewParams, progress: Callable[[float], None]
    ) -> list[Image.Image]:
        """One 32×32 picture for each (prompt, seed)."""
        pictures: list[Image.Image] = []
        for batch, report in batches(wishes, _BATCH, progress):
            pictures += _to_images(self.codec.decode(self._sample(batch, params, report)))
        return pictures

    def _sample(self, batch: Sequence[Wish], params: PreviewParams, progress: Callable[[float], None]) -> Tensor:
        """Latents (n, K, h, w) of the batch; guidance runs as one double batch."""
        scheduler = make_scheduler(params.sampler, self.noise)
        self.scheduler = type(scheduler).__name__
        scheduler.set_timesteps(params.steps)
        guided = params.guidance_scale != 1
        states = _states([prompt for prompt, _ in batch], self.tokens)
        if guided:
            states = torch.cat([_states([params.negative_prompt] * len(batch), {}), states])
        side = params.side // self.codec.patch or self.unet.config.sample_size
        shape = (self.codec.channels, side, side)
        latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in batch])
        latents = latents * scheduler.init_noise_sigma
        for step, time in enumerate(scheduler.timesteps):
            noisy = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, time)
            out: Tensor = self.unet(noisy, time, states).sample
            if guided:
                plain, wanted = out.chunk(2)
                out = plain + params.guidance_scale * (wanted - plain)
            latents = scheduler.step(out, time, latents).prev_sample
            progress((step + 1) / params.steps)
        result: Tensor = latents
        return result


def _states(prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
    texts, rows = zip(*(split_prompt(prompt, tokens) for prompt in prompts), strict=True)
    # Encoded one by one, so that a prompt's states do not depend on its neighbours.
    known = {text: token_states([text]) for text in dict.fromkeys(texts)}
    return place_rows(torch.cat([known[text] for text in texts]), rows)


def _load_unet(folder: Path) -> UNet2DConditionModel:
    stored = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return build_unet(UNet2DConditionModel.load_config(folder), stored)


def _to_images(pixels: Tensor) -> list[Image.Image]:
    """(n, 3, h, w) in [-1, 1] → RGB pictures."""
    array = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]
