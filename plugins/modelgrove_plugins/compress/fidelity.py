"""What a packed denoiser paints and computes, beside the original: the same prompts, the same seeds.

The original paints a few pictures, and every call of its network is kept. The packed network, its
activations rounded as the manifest says, answers the same calls (so that errors do not add up along
a trajectory), and paints the same pictures. This costs two small previews, and three more passes over the calls.
Everything outside the denoiser is the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, log10
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modelgrove_kernels.calls import Call, output_of, recorded
from modelgrove_plugins.compress.perception import features, frechet, perceptual
from modelgrove_plugins.compress.swapping import quantized_copy
from modelgrove_plugins.preview.diffusers import PreviewParams

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, nn

    from modelgrove_hub.contracts import DenoiserCall
    from modelgrove_plugins.compress.packed import Stored
    from modelgrove_plugins.preview.painter import Painter

PROMPTS = ("a red apple", "a sleeping cat", "a sailing boat on the sea", "a snowy mountain")
IMAGES = 2
_PARAMS = PreviewParams(prompts=PROMPTS, images=IMAGES, seed=2**31)
"""The seed is far from those of calibration sets, which count up from 0."""


@dataclass(frozen=True)
class OutputError:
    """‖ŷ - y‖² / ‖y‖² of a network's output (ε or v, whichever it predicts) over all calls, and at each timestep."""

    overall: float
    by_timestep: tuple[tuple[float, float], ...]


@dataclass
class Comparison:
    """The original's pictures and calls."""

    painter: Painter
    component: str
    calls: list[Call] = field(init=False)
    pictures: list[Image] = field(init=False)

    def __post_init__(self) -> None:
        with recorded(self.painter.networks[self.component]) as self.calls:
            self.pictures = _paint(self.painter)

    def report(
        self, tensors: Mapping[str, Stored | Tensor], timesteps: Sequence[int], sheet: Path, title: str
    ) -> dict[str, Any]:
        """What the packed network lost, as JSON values; writes the pictures side by side to `sheet`."""
        packed = quantized_copy(self.painter.networks[self.component], tensors, timesteps)
        return self.judged(packed, sheet, title)

    def judged(self, network: nn.Module, sheet: Path, title: str) -> dict[str, Any]:
        """The same of any network in the original's place."""
        original = self.painter.networks[self.component]
        error = epsilon_error(network, self.calls)
        self.painter.swap(self.component, network)
        with recorded(network) as calls:
            pictures = _paint(self.painter)
        seen, seen_now = features(original, self.calls), features(original, calls)
        _save(sheet, {"original": self.pictures, title: pictures})
        lost = psnr(self.pictures, pictures)
        return {
            "error": rounded(error.overall),
            "by_timestep": [[time, rounded(value)] for time, value in error.by_timestep],
            "psnr_db": None if lost == inf else round(lost, 2),
            "perceptual": rounded(perceptual(seen, seen_now)),
            "frechet": rounded(frechet(seen, seen_now)),
            "pictures": len(pictures),
            "steps": _PARAMS.steps,
        }


@torch.inference_mode()
def epsilon_error(network: Callable[..., Any], calls: Sequence[DenoiserCall]) -> OutputError:
    """How far the answers of `network` are from those of the calls.

    Raises:
        ValueError: there are no calls.
    """
    if not calls:
        raise ValueError("there are no calls to compare")
    sums: dict[float, tuple[float, float]] = {}
    for call in calls:
        found = output_of(network(*call.positional, **call.named))
        noise, signal = sums.get(call.timestep, (0.0, 0.0))
        noise += float((found - call.output).double().square().sum())
        sums[call.timestep] = noise, signal + float(call.output.double().square().sum())
    total = tuple(map(sum, zip(*sums.values(), strict=True)))
    return OutputError(_ratio(*total), tuple((time, _ratio(*sums[time])) for time in sorted(sums)))


def psnr(originals: Sequence[Image], others: Sequence[Image]) -> float:
    """Peak signal to noise ratio of RGB pictures in dB, peak 255, over all their pixels; infinite when equal."""
    pairs = zip(originals, others, strict=True)
    squares = [np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean() for a, b in pairs]
    noise = float(np.mean(squares))
    return 10 * log10(255**2 / noise) if noise else inf


def rounded(value: float) -> float:
    """To four digits: more change from one processor to the next."""
    return float(f"{value:.3e}")


def _paint(painter: Painter) -> list[Image]:
    wishes = [(prompt, _PARAMS.seed + column) for prompt in PROMPTS for column in range(IMAGES)]
    return painter.paint(wishes, _PARAMS, lambda _done: None)


def _save(sheet: Path, columns: Mapping[str, Sequence[Image]]) -> None:
    from modelgrove_plugins.preview.picture import arrange, enlarge
    from modelgrove_plugins.preview.sheet import join

    grids = {
        title: arrange([[enlarge(one, 0) for one in pictures[i : i + IMAGES]] for i in range(0, len(pictures), IMAGES)])
        for title, pictures in columns.items()
    }
    join(list(grids.items()), PROMPTS).save(sheet, "PNG")


def _ratio(noise: float, signal: float) -> float:
    return noise / signal if signal else 0.0
