"""Draw samples of many LoRAs at once and set them out on a sheet, one concept a row, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from modelgrove_analyzers.zoo.base_folder import ZooBase
from modelgrove_analyzers.zoo.loras import Lora, LoraStack
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_hub.search.text import token_states

STEPS = 8
GUIDANCE = 2.0
PROMPTS = (
    "a picture of cat", "red apple", "guitar", "fire engine", "rocket", "grinning face", "red heart", "pizza",
    "sailboat", "noto tiger", "twemoji house", "fluent rose", "snowman", "crown", "airplane", "octopus",
)  # fmt: skip
"""What a base sheet shows when it is not told."""
_ZOOM = 2
_NAME_WIDTH = 130


@torch.inference_mode()
def sample(
    base: ZooBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    loras: Sequence[Lora] = (),
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Pictures in [-1, 1], (len(prompts), len(seeds), 3, 32, 32), by DPM-Solver++(2M) with classifier-free guidance.

    With `loras`, LoRA i draws prompts[i]; without, the base draws them all.
    """
    n, count = len(prompts), len(seeds)
    shape = (base.codec.channels, base.unet.config.sample_size, base.unet.config.sample_size)
    start = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents = start.repeat(n, 1, 1, 1)
    texts, empty = token_states(prompts), token_states([""])
    # LoRA by LoRA: first its guided half, then its unguided half.
    states = torch.cat([texts[:, None].expand(-1, count, -1, -1), empty[None].expand(n, count, -1, -1)], 1).flatten(
        0, 1
    )
    solver = DPMSolverMultistepScheduler.from_config(base.noise.config, timestep_spacing="trailing")
    solver.set_timesteps(steps)
    with LoraStack(base.unet, loras).attached(n) if loras else nullcontext():
        for time in solver.timesteps:
            pairs = latents.view(n, 1, count, *shape).expand(-1, 2, -1, -1, -1, -1).reshape(-1, *shape)
            told, untold = base.unet(pairs, time, states).sample.view(n, 2, count, *shape).unbind(1)
            velocity = (untold + guidance * (told - untold)).reshape(-1, *shape)
            latents = solver.step(velocity, time, latents).prev_sample
    return base.codec.decode(latents).view(n, count, 3, *base.codec.decode(latents).shape[-2:])


def lora_sheet(
    base: ZooBase, pictures: PictureSet, loras: Sequence[Lora], seeds: Sequence[int] = (1, 2, 3)
) -> Image.Image:
    """One row a LoRA: two real drawings | the base told the concept | the base told the LoRA's prompt | the LoRA."""
    told = sample(base, [f"a picture of {lora.recipe.concept}" for lora in loras], seeds[:1])
    untold = sample(base, [lora.recipe.prompt for lora in loras], seeds[:1])
    drawn = sample(base, [lora.recipe.prompt for lora in loras], seeds, loras)
    rows = []
    for i, lora in enumerate(loras):
        real = pictures.pixels[list(lora.recipe.pictures[:2])]
        real = real if len(real) == 2 else np.concatenate([real, np.full_like(real, 255)])
        rows.append(
            (_caption(lora), np.concatenate([real, to_bytes(told[i]), to_bytes(untold[i]), to_bytes(drawn[i])]))
        )
    return lay_out(rows)


def base_sheet(base: ZooBase, prompts: Sequence[str], seeds: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> Image.Image:
    """What the base draws: one row a prompt, one column a seed."""
    drawn = sample(base, prompts, seeds)
    return lay_out([(prompt, to_bytes(drawn[i])) for i, prompt in enumerate(prompts)])


def to_bytes(pictures: Tensor) -> NDArray[np.uint8]:
    """(n, 3, h, w) in [-1, 1] → (n, h, w, 3) uint8."""
    values: NDArray[np.uint8] = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return values


def lay_out(rows: Sequence[tuple[str, NDArray[np.uint8]]], columns: int = 2) -> Image.Image:
    """A sheet of captioned rows of pictures (n, h, w, 3), in `columns` columns, doubled in size."""
    _, height, width, _ = rows[0][1].shape
    count = max(len(tiles) for _, tiles in rows)
    cell, line = _NAME_WIDTH + count * (width * _ZOOM + 2) + 8, height * _ZOOM + 2
    sheet = Image.new("RGB", (columns * cell, -(-len(rows) // columns) * line), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, tiles) in enumerate(rows):
        left, top = (i % columns) * cell, (i // columns) * line
        pen.multiline_text((left + 2, top + 4), name, fill="black")
        for j, tile in enumerate(tiles):
            big = Image.fromarray(tile).resize((width * _ZOOM, height * _ZOOM), Image.Resampling.NEAREST)
            sheet.paste(big, (left + _NAME_WIDTH + j * (width * _ZOOM + 2), top))
    return sheet


def _caption(lora: Lora) -> str:
    recipe = lora.recipe
    return (
        f"{recipe.concept}\nr {recipe.rank} a/r {recipe.scale:g} lr {recipe.learning_rate:.1e}\n"
        f"{recipe.steps} steps {len(recipe.pictures)} pic\nv {lora.first_loss:.3f} > {lora.last_loss:.3f}"
    )
