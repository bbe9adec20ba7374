"""Drop whole blocks of a denoiser: measure what each is worth, remove, distil what stays, write an ordinary model.

What a denoiser can do without is in removal.py, the learning in kernels/distillation.py. A block's sensitivity is the
error of the output while it alone is missing, on the model's own pictures; after each removal all are measured again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modelgrove_hub.contracts import Context, InputModel, Output, Result
from modelgrove_hub.errors import UsageError
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES
from modelgrove_hub.planning import size_of
from modelgrove_hub.tables import Relation
from modelgrove_plugins.compress.calibrating import CalibratedParams, Rehearsal
from modelgrove_plugins.compress.comparing import SHEET, compare_network
from modelgrove_plugins.compress.removal import (
    Unit,
    changes,
    config_of,
    inside,
    position_of,
    remaining,
    stages_of,
    units_of,
    without,
)

if TYPE_CHECKING:
    from torch import nn

    from modelgrove_kernels.calls import Call


class DroppingParams(CalibratedParams):
    """How blocks are measured, and how long the rest learns."""

    pictures: int = Field(8, ge=1, le=1024, description="Pictures painted to measure blocks and to learn from.")
    iterations: int = Field(200, ge=0, le=100_000, description="Steps of distillation afterwards; 0 learns nothing.")


@dataclass
class Dropped:
    """A denoiser that loses blocks."""

    network: nn.Module
    calls: Sequence[Call]
    units: Sequence[Unit]
    removed: list[Unit] = field(default_factory=list)
    error: float = 0.0
    """Of the output, as it is now."""
    sensitivities: dict[str, float] = field(default_factory=dict)
    """Name of a unit → the error of the whole network without it alone."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all modules that are gone."""
        return tuple(path for unit in self.removed for path in unit.paths)

    def size(self, *more: str) -> int:
        """Parameters that stay, if the modules at the paths `more` go as well."""
        gone = (*self.paths, *more)
        weights = self.network.state_dict()
        return sum(weights[name].numel() for name in remaining(list(weights), gone))

    def offers(self, allowed: Callable[[Unit], bool]) -> list[tuple[Unit, float]]:
        """What may go next, with the error that the output would then have; the least for each weight saved first."""
        from modelgrove_plugins.compress.fidelity import epsilon_error

        size, found = self.size(), []
        for unit in self.units:
            saved = size - self.size(*unit.paths)
            if not allowed(unit) or saved <= 0:
                continue
            try:
                smaller = without(self.network, (*self.paths, *unit.paths))
            except ValueError:
                continue  # it fitted alone, but not beside what is gone
            found.append((unit, epsilon_error(smaller, self.calls).overall, saved))
        return [(unit, error) for unit, error, _ in sorted(found, key=lambda one: (one[1] - self.error) / one[2])]

    def remove(self, unit: Unit, error: float) -> None:
        """Let a unit go; the output's error is `error` now."""
        self.removed.append(unit)
        self.error = error


Choose = Callable[[Dropped, Callable[[str], None]], None]
"""Removes units from what it is given; tells what it is doing."""


def drop(context: Context, method: str, params: DroppingParams, choose: Choose, frozen: float, guided: bool) -> Result:
    """Measure, choose, distil, write.

    Stages before the relative depth `frozen` do not learn. `guided`: the more sensitive a stage, the weaker it is held.

    Raises:
        UsageError: the model cannot paint, its denoiser has no blocks that could go, or none was chosen.
    """
    from modelgrove_kernels.calls import recorded
    from modelgrove_plugins.compress.fidelity import rounded

    model = context.inputs[0]
    rehearsal = Rehearsal(context, model, params)
    network, component = rehearsal.network.requires_grad_(False), rehearsal.component
    units = units_of(network)
    if not units:
        raise UsageError(
            f"{model.name}: {type(network).__name__} has no blocks that its configuration could do without"
        )
    with recorded(network) as calls:
        rehearsal.paint()
    dropped = Dropped(network, calls, units)
    whole = dropped.size()
    choose(dropped, partial(context.progress, 0.1))
    if not dropped.removed:
        raise UsageError(f"{model.name}: no block may go under these parameters; ask for less to be kept")
    student = without(network, dropped.paths)
    learned = _distil(context, dropped, student, params.iterations, frozen, guided) if params.iterations else None
    fields = changes(config_of(network), list(network.state_dict()), dropped.paths)
    files, before, after = _write(context, model, component, student, fields)
    compared = compare_network(context, component, student, method, params.fidelity)
    report = {
        "method": method,
        "bytes_before": before,
        "bytes_after": after,
        "parameters_before": whole,
        "parameters_after": dropped.size(),
        "removed": [unit.name for unit in dropped.removed],
        "units": [_shown(unit, dropped.sensitivities.get(unit.name)) for unit in units],
        "error_removed": rounded(dropped.error),
        "error_distilled": None if learned is None else rounded(learned),
        "fidelity": compared,
    }
    relation = Relation.DISTILLED if params.iterations else Relation.EDIT
    return Result((Output(files, relation, tags=("pruned",)),), report, (SHEET,) if "error" in compared else ())


def _shown(unit: Unit, error: float | None) -> dict[str, Any]:
    from modelgrove_plugins.compress.fidelity import rounded

    return {
        "name": unit.name,
        "position": round(unit.position, 3),
        "error": None if error is None else rounded(error),
    }


def _distil(
    context: Context, dropped: Dropped, student: nn.Module, iterations: int, frozen: float, guided: bool
) -> float:
    from modelgrove_kernels.distillation import distil
    from modelgrove_plugins.compress.fidelity import epsilon_error

    stages = stages_of(dropped.network)
    names = remaining(list(dropped.network.state_dict()), dropped.paths)
    back = {new: old for old, new in names.items()}
    for name, weight in student.named_parameters():
        weight.data = weight.data.clone()  # the original's until now
        depth = position_of(back[name], stages)
        weight.requires_grad_(depth is not None and depth >= frozen)
    distil(
        student, dropped.network, _held(dropped, stages, guided), dropped.calls, iterations, context.generator(),
        lambda done: context.progress(0.2 + 0.6 * done, "distilling"),
    )  # fmt: skip
    return epsilon_error(student.requires_grad_(False), dropped.calls).overall


def _held(dropped: Dropped, stages: Sequence[str], guided: bool) -> dict[str, tuple[str, float]]:
    """Stages that are left → their path in the student and how strongly they are held; the weights' mean is 1 / n."""
    kept = remaining([f"{stage}." for stage in stages], dropped.paths)
    lost = {stage.rstrip("."): _stage_sensitivity(dropped, stage.rstrip(".")) for stage in kept}
    strength = {stage: 1 / (value + 1e-6) if guided else 1.0 for stage, value in lost.items()}
    whole = sum(strength.values())
    return {old.rstrip("."): (new.rstrip("."), strength[old.rstrip(".")] / whole) for old, new in kept.items()}


def _stage_sensitivity(dropped: Dropped, stage: str) -> float:
    """The largest of the units in it."""
    own = [
        dropped.sensitivities.get(unit.name, 0.0)
        for unit in dropped.units
        if any(inside(path, stage) for path in unit.paths)
    ]
    return max(own, default=0.0)


def _write(
    context: Context, model: InputModel, component: str, student: nn.Module, changed: Mapping[str, Any]
) -> tuple[tuple[str, ...], int, int]:
    """The model with the smaller denoiser, in one file, in its old dtype; all other files as they are.

    Returns:
        The paths written, and the bytes of all tensors before and after.
    """
    import torch

    from modelgrove_hub.store.dtypes import DTYPES

    tensors = list(model.tensors())
    own = [tensor for tensor in tensors if tensor.name.partition("/")[0] == component]
    before, after = sum(map(size_of, tensors)), sum(map(size_of, tensors)) - sum(map(size_of, own))
    weights = {tensor.file for tensor in own}
    target = next(iter(weights)) if len(weights) == 1 else f"{component}/diffusion_pytorch_model.safetensors"
    kind = getattr(torch, str(DTYPES[own[0].dtype].torch))
    writer = context.writer(target, {"format": "pt"})
    for name, values in student.state_dict().items():
        stored = values.to(kind) if values.is_floating_point() else values
        writer.add(name, stored)
        after += stored.nbytes
    copied = []
    for path, source in model.files().items():
        place = PurePosixPath(path)
        foreign = place.suffix in WEIGHT_SUFFIXES and place.suffix != ".safetensors"
        if path in weights or foreign or (place.parts[0] == component and path.endswith(".index.json")):
            continue
        if path == f"{component}/config.json":
            config = json.loads(source.read_bytes())
            context.path(path).write_text(json.dumps({**config, **changed}, indent=2), "utf-8")
        else:
            shutil.copyfile(source, context.path(path))
        copied.append(path)
    return (target, *copied), before, after
