"""TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503): what a denoiser knows of the timestep, kept through rounding.

The MLP that embeds t and the layers that project it into each block are one block of their own, which sees no picture
and only as many different inputs as there are timesteps. Its rounding is learned for what all projections answer at all
of them ("temporal information aware reconstruction"), and its activations have a range for each interval of timesteps
("finite set calibration": the least and the largest of a finite set, exactly). Where captions or classes are added to
the embedding, what was added in some pictures belongs to the set. All other layers are Q-Diffusion's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, LazyTensor, Params, Result
from modelgrove_plugins.compress.activations import with_ranges
from modelgrove_plugins.compress.calibrating import Rehearsal
from modelgrove_plugins.compress.packed import Stored, matrix_of, pack_as
from modelgrove_plugins.compress.q_diffusion import (
    QDiffusionParams,
    Splits,
    decided,
    learn,
    prepared,
    relaxed,
    rounded,
    start_for,
)
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_kernels.packing import Packed
    from modelgrove_kernels.temporal import TemporalBlock

_KEPT = "*embed*"
"""The pattern by which other compressors keep embeddings; those of time are taken here all the same."""
_TIME = ("*time_embed*", "*timestep_embed*")
_TIMESTEPS = 1000
"""Of a scheduler that does not say how many it has."""
_SCHEDULER = "scheduler/scheduler_config.json"
_WATCHED = 8
"""Pictures whose additions to the embedding are looked at."""
_DRAWN = 4
"""Additions that each timestep is paired with."""


class TfmqParams(QDiffusionParams):
    """How long temporal layers are learned, and how many ranges they have."""

    temporal_iterations: int = Field(1000, ge=0, le=100_000, description="Steps of learning for the temporal layers.")
    intervals: int = Field(100, ge=1, le=1000, description="Intervals of timesteps, each with ranges of its own.")

    def takes_shape(self, name: str, shape: Sequence[int]) -> bool:
        """As elsewhere, but the pattern "*embed*" does not keep embeddings of time."""
        time = any(fnmatchcase(name, pattern) for pattern in _TIME)
        skip = tuple(pattern for pattern in self.skip if not (time and pattern == _KEPT))
        return super(TfmqParams, self.model_copy(update={"skip": skip})).takes_shape(name, shape)


class Tfmq:
    """Learn the rounding of the layers that carry the timestep over all timesteps, and that of all others by blocks."""

    name: ClassVar[str] = "tfmq"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "TFMQ-DM: layers of time learned over all timesteps, ranges for each; else q-diffusion."
    paper: ClassVar[str] = "Huang et al., TFMQ-DM (CVPR 2024, arXiv 2311.16503)"
    Params: ClassVar[type[Params]] = TfmqParams

    def run(self, context: Context, params: TfmqParams) -> Result:
        """Paint, learn the layers of time, then all others; the report's `temporal` says what emb_{t,i} lost.

        A model whose embedding of time is not found is compressed as by Q-Diffusion, and the report says so.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight or a layer's input is NaN or infinite; the message names it.
        """
        model = context.inputs[0]
        blocks, splits = _watched(context, model, params)
        temporal = {name: layer for block in blocks for name, layer in block.learned(context, params)}
        layers = prepared(context, model, params, splits, temporal)
        learn(context, model, params, layers, temporal)
        kept = {True: dict[str, Stored](), False: dict[str, Stored]()}

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            if tensor.name not in temporal:
                return rounded(tensor, layers.get(tensor.name), params)
            for learned, made in kept.items():
                made[tensor.name] = temporal[tensor.name].packed(tensor.read(), params.activation_bits, learned)
            return kept[True][tensor.name]

        bounds = blocks[0].bounds if temporal and params.activation_bits < 16 else ()
        result = compress(
            context, self.name, params.recorded(), quantize, f"int{params.bits}", timesteps=bounds,
            fidelity=params.fidelity,
        )  # fmt: skip
        return replace(result, report={**result.report, "temporal": _report(blocks, temporal, kept)})


@dataclass(frozen=True)
class TimeLayer:
    """A layer of time: how its weight was learned, and what it is given, interval by interval."""

    block: TemporalBlock
    inside: str
    """Path in the block."""
    codes: Packed
    nearest: Packed
    ranges: Tensor
    """Least and largest input, (intervals, 1, 2)."""

    def packed(self, values: Tensor, bits: int, learned: bool) -> Stored:
        """As it was learned, with a range for each interval; or, to compare, to nearest with one for all timesteps.

        There are no ranges where activations have 16 bits.
        """
        import torch

        ranges = self.ranges
        if not learned:
            ranges = torch.stack([ranges[..., 0].amin(0), ranges[..., 1].amax(0)], -1)[None]
        plain = pack_as(values, self.codes if learned else self.nearest, {"temporal": True})
        return plain if bits == 16 else with_ranges(plain, bits, ranges)


@dataclass(frozen=True)
class Time:
    """A temporal block with its finite set: each timestep, with some of what was added to it."""

    block: TemporalBlock
    component: str
    steps: int
    """Timesteps are 0 … steps - 1."""
    intervals: int

    @property
    def bounds(self) -> list[int]:
        """Where the intervals begin."""
        return [self.steps * place // self.intervals for place in range(self.intervals)]

    def sets(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(samples, timesteps) of each interval: arguments of the block."""
        import torch

        generator = torch.Generator().manual_seed(0)
        drawn = min(self.block.samples, _DRAWN)
        for first, end in zip(self.bounds, [*self.bounds[1:], self.steps], strict=True):
            times = torch.arange(first, end).repeat(drawn)
            yield torch.randint(self.block.samples, times.shape, generator=generator), times

    def learned(self, context: Context, params: TfmqParams) -> Iterator[tuple[str, TimeLayer]]:
        """Names and layers; "temporal information aware reconstruction", then "finite set calibration".

        Raises:
            DataError: a weight is NaN or infinite; the message names it.
        """
        import torch

        from modelgrove_kernels.calls import Call
        from modelgrove_kernels.reconstruction import reconstruct

        sets, plain = list(self.sets()), params.model_copy(update={"start": "nearest"})
        samples, times = (torch.cat(part) for part in zip(*sets, strict=True))
        layers = {}
        for inside, path in self.block.paths.items():
            name, weight = f"{self.component}/{path}.weight", self.block.get_parameter(f"{inside}.weight").detach()
            if params.takes_shape(name, weight.shape):
                grid = start_for(name, matrix_of(weight), (), plain)
                layers[inside] = name, weight, grid, relaxed(weight, grid, plain)
        if layers and params.temporal_iterations:
            with torch.no_grad():
                call = Call(0.0, (samples, times), {}, self.block(samples, times))
            weights = {f"{inside}.weight": layer[-1] for inside, layer in layers.items()}
            reconstruct(
                self.block, weights, [call], params.temporal_iterations, context.generator(),
                lambda _done: context.progress(0.0, "learning what timesteps become"),
            )  # fmt: skip
        seen = [self.block.inputs(*one) for one in sets]
        for inside, (name, weight, grid, rounding) in layers.items():
            ranges = torch.stack([torch.stack(torch.aminmax(inputs[inside])) for inputs in seen])[:, None]
            yield name, TimeLayer(self.block, inside, decided(rounding, matrix_of(weight), grid), grid, ranges)

    def error(self, layers: Mapping[str, Stored]) -> float:
        """‖ê - e‖² / ‖e‖² of all emb_{t,i}, the mean over the set, with `layers` (by path inside) in their places."""
        import torch

        from modelgrove_plugins.compress.swapping import swap_layers

        copy, errors = deepcopy(self.block), []
        swap_layers(copy, ((f"{inside}.weight", layer) for inside, layer in layers.items()), self.bounds)
        with torch.no_grad():
            for samples, times in self.sets():
                exact, found = self.block(samples, times), copy(samples, times)
                errors.append((found - exact).square().sum(1) / exact.square().sum(1))
        return float(torch.cat(errors).mean())


def _watched(context: Context, model: InputModel, params: TfmqParams) -> tuple[list[Time], Splits]:
    """Where the denoiser embeds the timestep, and which of its layers have joined inputs."""
    from modelgrove_kernels.concatenation import concatenated
    from modelgrove_kernels.temporal import watched_time

    few = params.model_copy(update={"pictures": min(params.pictures, _WATCHED), "steps": 2})
    rehearsal = Rehearsal(context, model, few)
    with watched_time(rehearsal.network.requires_grad_(False)) as watch, concatenated(rehearsal.network) as found:
        rehearsal.paint()
    steps = _timesteps_of(model)
    intervals = min(params.intervals, steps)
    blocks = [Time(block, rehearsal.component, steps, intervals) for block in watch.blocks()]
    return blocks, {f"{rehearsal.component}/{path}.weight": sizes for path, sizes in found.items()}


def _timesteps_of(model: InputModel) -> int:
    file = model.files().get(_SCHEDULER)
    try:
        said = json.loads(file.read_text("utf-8")).get("num_train_timesteps") if file else None
    except (ValueError, AttributeError):
        said = None
    return said if isinstance(said, int) and said > 0 else _TIMESTEPS


def _report(
    blocks: Sequence[Time], temporal: Mapping[str, TimeLayer], kept: Mapping[bool, Mapping[str, Stored]]
) -> dict[str, Any]:
    """How many layers see nothing but t, over how many timesteps, and the temporal error of the worst block.

    `error_nearest` is what rounding to nearest and one range for all timesteps would have made of it.
    """
    if not kept[True]:
        return {"reason": "no layer was found that sees nothing but the timestep"}
    errors = {}
    for learned, key in ((True, "error"), (False, "error_nearest")):
        found = []
        for block in blocks:
            mine = {name: layer.inside for name, layer in temporal.items() if layer.block is block.block}
            found.append(block.error({inside: kept[learned][name] for name, inside in mine.items()}))
        errors[key] = float(f"{max(found):.3e}")
    return {"layers": len(kept[True]), "timesteps": blocks[0].steps, "intervals": blocks[0].intervals, **errors}
