"""Train the zoo's base: a small text-conditional diffusion UNet on captioned drawings.

Latents are 8×8×24 (a fixed linear codec of 32×32 pictures), captions enter as MiniLM token
states through cross-attention and, pooled, with the timestep. v-prediction (Salimans & Ho, arXiv
2202.00512, eq. 11 ff.), squared-cosine schedule, logit-normal timesteps, 10 % caption drop, EMA.
Training is resumable: a checkpoint is written every few hundred steps, atomically.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from modelgrove_analyzers.zoo.pictures import Picture, PictureSet
from modelgrove_hub.search.text import WIDTH, token_states
from modelgrove_kernels.codec import LinearCodec

HELD_OUT_GROUPS = ("flags", "people", "symbols", "component")
"""Never seen by the base, so that LoRAs on them teach it something new."""

UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (96, 160),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,  # diffusers: this is the number of heads
    "norm_num_groups": 16,
    # The attention-pooled caption is added to the time embedding: it reaches every block from the first step on.
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 8,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}

Progress = Callable[[float, str], None]
"""Told how much is done, in [0, 1], and what."""


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides the base. `learning_rate` decays linearly over the last `decay` share of `steps`."""

    steps: int = 12000
    batch: int = 32
    learning_rate: float = 1.2e-3
    warmup: int = 200
    decay: float = 0.4
    ema: float = 0.999
    caption_drop: float = 0.1
    channels: int = 24
    seed: int = 0
    checkpoint_every: int = 250


def is_base_picture(index: int, picture: Picture) -> bool:
    """Whether the base trains on this picture; every thirtieth is held out to measure generalisation."""
    return picture.group not in HELD_OUT_GROUPS and index % 30 != 7


def captions(picture: Picture) -> tuple[str, ...]:
    """The captions a picture is trained with: artist and label, the label alone, a plain sentence."""
    return picture.caption, picture.label, f"a picture of {picture.label}"


class BaseTrainer:
    """The training loop's state; `run` continues from the last checkpoint in `folder`."""

    def __init__(self, pictures: PictureSet, folder: Path, recipe: BaseRecipe) -> None:
        self.folder, self.recipe = folder, recipe
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        rows = [i for i, p in enumerate(pictures.pictures) if is_base_picture(i, p)]
        chosen = [pictures.pictures[i] for i in rows]
        self.pixels = to_pixels(pictures.pixels[rows])
        self.codec = LinearCodec.fit(self.pixels, recipe.channels)
        texts = sorted({c for p in chosen for c in captions(p)} | {""})
        self.states = torch.cat([token_states(texts[i : i + 256]) for i in range(0, len(texts), 256)])
        place = {text: i for i, text in enumerate(texts)}
        self.caption_rows = torch.tensor([[place[c] for c in captions(p)] for p in chosen])
        self.empty_row = place[""]
        self.unet = UNet2DConditionModel(in_channels=recipe.channels, out_channels=recipe.channels, **UNET)
        self.average = {name: p.detach().clone() for name, p in self.unet.named_parameters()}
        self.noise = DDPMScheduler(**SCHEDULER)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), recipe.learning_rate, weight_decay=0.01, fused=True)
        self.step = 0
        self._resume()

    def run(self, progress: Progress = lambda _done, _message: None) -> None:
        """Train until `recipe.steps`."""
        steps, loss = self.recipe.steps, None
        while self.step < steps:
            latest = self._train_step()
            loss = latest if loss is None else 0.98 * loss + 0.02 * latest
            self.step += 1
            progress(self.step / steps, f"step {self.step}, loss {loss:.3f}")
            if self.step % self.recipe.checkpoint_every == 0 or self.step == steps:
                self._checkpoint()

    def _train_step(self) -> float:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        rows = torch.randint(len(self.pixels), (recipe.batch,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        latents = self.codec.encode(self.pixels[rows].roll(shift, dims=(2, 3)))
        forms = torch.multinomial(torch.tensor([0.5, 0.25, 0.25]), recipe.batch, replacement=True, generator=generator)
        texts = self.caption_rows[rows, forms]
        drop = torch.rand(recipe.batch, generator=generator) < recipe.caption_drop
        states = self.states[torch.where(drop, self.empty_row, texts)]
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * self._schedule()
        loss = v_loss(self.unet, self.noise, latents, states, generator)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        averages, values = list(self.average.values()), [p.detach() for p in self.unet.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)
        return float(loss.detach())

    def _schedule(self) -> float:
        recipe = self.recipe
        left = (recipe.steps - self.step) / (recipe.decay * recipe.steps)
        return min(1.0, (self.step + 1) / recipe.warmup, left)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.unet.load_state_dict(state["unet"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]

    def _checkpoint(self) -> None:
        partial = self.folder / "checkpoint.pt.partial"
        state = {
            "unet": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "codec": self.codec.tensors(),
            "step": self.step,
            "recipe": json.dumps(asdict(self.recipe)),
        }
        torch.save(state, partial)
        os.replace(partial, self.folder / "checkpoint.pt")


def to_pixels(pictures: Any) -> Tensor:
    """uint8 (n, 32, 32, 3) → float32 (n, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def v_loss(
    unet: UNet2DConditionModel, noise: DDPMScheduler, latents: Tensor, states: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of v at logit-normal timesteps. Latents (n, K, 8, 8), states (n, 16, 384)."""
    return v_errors(unet, noise, latents, states, *draw_noise(latents.shape, generator)).mean()


def draw_noise(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logit-normal timesteps (n,) int64 in [0, 1000) and normal noise for latents of `shape` (n, K, 8, 8).

    The law leans to late timesteps (mean 1, deviation 1.2 before the sigmoid): neighbouring latents are alike
    and the first components are large, so a picture's layout is still visible at t = 900 of 1000. A model that
    hardly ever sees t > 900 draws the shape that its noise suggests, whatever the text says.
    """
    times = ((1 + 1.2 * torch.randn(shape[0], generator=generator)).sigmoid() * 1000).long().clamp(0, 999)
    return times, torch.randn(shape, generator=generator)


def v_errors(
    unet: UNet2DConditionModel, noise: DDPMScheduler, latents: Tensor, states: Tensor, times: Tensor, epsilon: Tensor
) -> Tensor:
    """Mean squared error of v for each latent, (n,), at the given timesteps (n,) and noise, shaped like the latents."""
    noisy = noise.add_noise(latents, epsilon, times)
    target = noise.get_velocity(latents, epsilon, times)
    errors: Tensor = (unet(noisy, times, states).sample - target).square().mean((1, 2, 3))
    return errors
