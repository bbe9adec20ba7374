"""What the previewer asks of a pipeline, whatever its class: its networks, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import diffusers

from modelgrove_hub.errors import UsageError
from modelgrove_plugins.compress.targets import DENOISERS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from modelgrove_plugins.preview.diffusers import PreviewParams

Wish = tuple[str, int]
"""A prompt and a seed: one picture."""
SAMPLERS = {"dpm++2m": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler"}


class Painter(Protocol):
    """A loaded pipeline in float32."""

    pipeline: str
    """Class name, for the recipe."""
    scheduler: str
    """Class name of the scheduler that painted last."""
    tokens: dict[str, Tensor]
    """Style tokens of adapters by name: rows that take part where a prompt has <name>."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Component name → network: where adapters are fused in."""

    @property
    def noise(self) -> Mapping[str, Any]:
        """The configuration of the noise schedule that it was trained with."""

    def swap(self, component: str, network: nn.Module) -> None:
        """Paint with `network` from now on, in the place of the component of that name."""

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        """Latents (n, c, h, w) of RGB pictures, which are cut to squares of the model's own size."""

    def paint(self, wishes: Sequence[Wish], params: PreviewParams, progress: Callable[[float], None]) -> list[Image]:
        """One RGB picture for each (prompt, seed); `progress` is told the share done after every step."""


def denoiser_of(painter: Painter, model: str) -> str:
    """The name of the component that predicts noise.

    Raises:
        UsageError: `model` has none.
    """
    found = next((name for name in DENOISERS if name in painter.networks), None)
    if found is None:
        raise UsageError(f"{model} has no {' or '.join(DENOISERS)}: its parts are {', '.join(painter.networks)}")
    return found


def batches(
    wishes: Sequence[Wish], size: int, progress: Callable[[float], None]
) -> Iterator[tuple[Sequence[Wish], Callable[[float], None]]]:
    """Up to `size` wishes at a time, each with a `progress` for the share of that batch."""
    for start in range(0, len(wishes), size):
        batch = wishes[start : start + size]
        yield batch, partial(_report, progress, start / len(wishes), len(batch) / len(wishes))


def _report(progress: Callable[[float], None], before: float, share: float, done: float) -> None:
    progress(before + share * done)


def make_scheduler(sampler: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler for `sampler` on the noise schedule of `config`.

    Steps are spaced "trailing", so that the first one starts at pure noise (Lin et al.,
    arXiv 2305.08891, section 3.3).
    """
    return getattr(diffusers, SAMPLERS[sampler]).from_config(config, timestep_spacing="trailing")
