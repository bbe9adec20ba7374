"""A pipeline in memory for evaluators: its denoiser is asked about noised pictures, and paints.

What a denoiser is given beside latents and time (states of the caption, sizes) differs between pipeline classes. So
it is overheard: the pipeline begins to paint the caption and is stopped at the first call of its denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelgrove_hub.contracts import Picture
from modelgrove_hub.errors import UsageError
from modelgrove_kernels.calls import Call
from modelgrove_plugins.preview.diffusers import PreviewParams
from modelgrove_plugins.preview.painter import denoiser_of

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from PIL.Image import Image

    from modelgrove_plugins.preview.painter import Painter

ASKED = ("ZooPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Pipelines whose denoisers take (latents, time, …) on a schedule of variances."""
_BATCH = 32


class _Heard(Exception):  # noqa: N818  (not an error: it stops a painting)
    def __init__(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.positional, self.named = positional, named


class Live:
    """Implements `contracts.LivePipeline` on a painter.

    Raises:
        UsageError: the model called `name` has no denoiser.
    """

    def __init__(self, painter: Painter, name: str) -> None:
        self._painter = painter
        self._heard: dict[str, _Heard] = {}
        """What the denoiser is given for a caption; its weights have no part in it."""
        self.component = denoiser_of(painter, name)

    @property
    def network(self) -> nn.Module:
        """The denoiser that paints."""
        return self._painter.networks[self.component]

    @cached_property
    def original(self) -> nn.Module:
        """A copy of it, as it is when this is first asked for: before weights are set."""
        return deepcopy(self.network)

    @property
    def schedule(self) -> DDPMScheduler:
        """The noise that the denoiser was trained with."""
        from diffusers import DDPMScheduler

        schedule: DDPMScheduler = DDPMScheduler.from_config(self._painter.noise)
        return schedule

    @torch.inference_mode()
    def ask(self, pictures: Sequence[Picture], levels: Sequence[float], seed: int) -> list[Call]:
        """Every picture at every level, a batch of pictures at one level in a call; the output is what is right.

        Raises:
            UsageError: the pipeline's class is none of `ASKED`, or predicts what is not known here.
        """
        if self._painter.pipeline not in ASKED:
            raise UsageError(
                f"a {self._painter.pipeline} cannot be asked about pictures, only {', '.join(ASKED)}: "
                "for others take an evaluator that looks at what they paint"
            )
        schedule = self.schedule
        generator = torch.Generator().manual_seed(seed)
        calls = []
        for start in range(0, len(pictures), _BATCH):
            batch = pictures[start : start + _BATCH]
            latents = self._painter.encode([picture.image for picture in batch])
            positional, named = self.conditions([picture.caption for picture in batch])
            for level in levels:
                time = round(level * (schedule.config.num_train_timesteps - 1))
                times = torch.full((len(batch),), time)
                noise = torch.randn(latents.shape, generator=generator)
                noised = schedule.add_noise(latents, noise, times)
                right = right_answer(schedule, latents, noise, times)
                calls.append(Call(float(time), (noised, times, *positional[2:]), named, right))
        return calls

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> list[Image]:
        """One picture for each prompt and its seed."""
        params = PreviewParams(prompts=("evaluation",), steps=steps, guidance_scale=guidance)
        return self._painter.paint(list(zip(prompts, seeds, strict=True)), params, lambda _done: None)

    def conditions(self, captions: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an unguided call for each caption, as one batch."""
        for caption in captions:
            if caption not in self._heard:
                self._heard[caption] = self._overheard(caption)
        calls = [self._heard[caption] for caption in captions]
        positional = tuple(_joined(parts) for parts in zip(*(call.positional for call in calls), strict=True))
        return positional, {name: _joined([call.named[name] for call in calls]) for name in calls[0].named}

    def _overheard(self, caption: str) -> _Heard:
        def stop(_network: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Heard(positional, named)

        handle = self.network.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.paint([caption], [0], 1, 1.0)
        except _Heard as heard:
            return heard
        finally:
            handle.remove()
        raise UsageError(f"a {self._painter.pipeline} paints without calling its {self.component}")


def _joined(parts: Sequence[Any]) -> Any:
    """The same argument of calls with one sample each: tensors in one batch, in mappings too, all else as it is."""
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts]) for name in first}
    return first


def right_answer(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """What the denoiser should answer: noise, v or the latents themselves.

    Raises:
        UsageError: it predicts something else.
    """
    kind = schedule.config.prediction_type
    if kind == "v_prediction":
        velocity: Tensor = schedule.get_velocity(latents, noise, times)
        return velocity
    if kind not in ("epsilon", "sample"):
        raise UsageError(
            f"the denoiser predicts {kind!r}, not noise, v or the sample: it cannot be asked about pictures"
        )
    return noise if kind == "epsilon" else latents
