"""The layers of a registered model, each with a few numbers: what a heat map shows.

Of networks everything is told by what ingest measured, and no weight is read. Of adapters the factors are read once;
the last answers are kept in memory, for a revision never changes.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from modelgrove_hub.formats.folders import chosen_weights
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.inputs import RegisteredModel, load_input

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.adapters import Factors
    from modelgrove_hub.formats.updates import Update
    from modelgrove_hub.store.manifest import TensorRow

_KEPT = 64
_LARGEST_CORE = 256
"""Ranks up to which singular values are computed: they take the cube of it."""
_kept: OrderedDict[tuple[str, int], Layers] = OrderedDict()
_guard = threading.Lock()


@dataclass(frozen=True)
class Layer:
    """One weight of two dimensions or more."""

    module: str
    """With its component: "unet/down_blocks.0.resnets.1.conv1"."""
    block: str
    """Where it is: "unet/down_blocks.0.resnets.1"."""
    role: str
    """What it is there: "conv1", "attn1.to_q"."""
    shape: tuple[int, ...]
    norm: float | None
    """L2 norm of the weight, or of what an adapter adds to it; None where it is not known."""
    spread: float | None
    """Root mean square of the entries."""
    change: float | None
    """As a share of the base's norm, where the base is known: for networks estimated from 64 samples a tensor."""
    rank: int | None = None
    effective_rank: float | None = None
    """exp of the entropy of the singular values (Roy and Vetterli, EUSIPCO 2007)."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model, in the order of its files."""

    of: Literal["weights", "changes"]
    layers: list[Layer]
    base: str | None
    """What `change` is relative to."""
    unread: list[str]
    """Modules whose change depends on the base's weights, and so is not told."""


def read_layers(hub: Hub, revision_id: int) -> Layers:
    """The layers of a revision.

    Raises:
        UnsafeFileError: it is quarantined.
        UsageError: an adapter's method is not understood.
        NotFoundError, DataError, StorageError: its files cannot be read.
    """
    key = (hub.settings.database, revision_id)
    with _guard:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
        model = load_input(hub, revision_id)
        found = _of_adapter(model) if model.adapter_type else _of_network(model)
        _kept[key] = found
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return found


def place_of(module: str) -> tuple[str, str]:
    """A module's block and its role in it: what follows the last numbered member of a list."""
    component, slash, path = module.rpartition("/")
    parts = path.split(".")
    cut = 0
    for number in range(1, len(parts)):
        if parts[number].isdigit() and parts[number - 1].endswith(("s", "block")) and number + 1 < len(parts):
            cut = number + 1
    return component + slash + ".".join(parts[:cut]), ".".join(parts[cut:])


def _of_network(model: RegisteredModel) -> Layers:
    rows, base = _weights_of(model), _weights_of(model.base) if model.base else {}
    found = []
    for module, row in rows.items():
        spread = row.norm / math.sqrt(prod(row.shape)) if row.norm is not None else None
        change = _moved(row, base[module]) if module in base else None
        found.append(Layer(module, *place_of(module), row.shape, row.norm, spread, change))
    return Layers("weights", found, model.base.name if model.base and found else None, [])


def _of_adapter(model: RegisteredModel) -> Layers:
    from modelgrove_hub.formats.updates import open_updates

    updates = [update for update in open_updates(model).targets.values() if update.parameter == "weight"]
    base = _weights_of(model.base) if model.base else {}
    found = [_change(update, base) for update in updates if not update.needs_weight]
    known = any(layer.change is not None for layer in found)
    unread = [_named(update) for update in updates if update.needs_weight]
    return Layers("changes", found, model.base.name if model.base and known else None, unread)


def _change(update: Update, base: Mapping[str, TensorRow]) -> Layer:
    module = _named(update)
    values = update.read()
    norm, rank, effective = _measured(values)
    shape = update.shape or tuple(getattr(values, "shape", (0, 0)))
    weight = base.get(module) or base.get(update.module)
    change = norm / weight.norm if weight is not None and weight.norm else None
    spread = norm / math.sqrt(prod(shape)) if prod(shape) else None
    return Layer(module, *place_of(module), (shape[0], shape[1]), norm, spread, change, rank, effective)


def _measured(values: Factors | Tensor) -> tuple[float, int | None, float | None]:
    """Norm, rank and effective rank of a change; of factors in their small core."""
    import torch

    if isinstance(values, torch.Tensor):
        return float(values.norm()), None, None
    up, down = values.up.double(), values.down.double()
    if values.rank > _LARGEST_CORE:
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()), values.rank, None
    core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
    singular = torch.linalg.svdvals(core)
    shares = singular[singular > 0] / singular.sum()
    entropy = float(-(shares * shares.log()).sum())
    return float(singular.norm()), values.rank, math.exp(entropy) if len(shares) else 0.0


def _weights_of(model: RegisteredModel) -> dict[str, TensorRow]:
    """What ingest measured of weights of two dimensions or more, by module."""
    wanted = set(chosen_weights(model.paths))
    return {
        module: row
        for path, scan in model.scans().items()
        if path in wanted
        for module, row in _modules(path, scan.tensors)
    }


def _modules(path: str, rows: tuple[TensorRow, ...]) -> Iterator[tuple[str, TensorRow]]:
    folder = PurePosixPath(path).parent.as_posix()
    before = "" if folder == "." else f"{folder}/"
    for row in rows:
        if len(row.shape) > 1:
            yield before + row.name.removesuffix(".weight"), row


def _moved(row: TensorRow, base: TensorRow) -> float | None:
    """How far sampled values are from the base's, as a share of their norm."""
    import numpy as np

    own, other = row.sketch, base.sketch
    if row.shape != base.shape or own.size != other.size or not own.size:
        return None
    length = float(np.linalg.norm(other))
    moved = float(np.linalg.norm(own - other))
    return moved / length if length > 0 and math.isfinite(moved) else None


def _named(update: Update) -> str:
    return f"{update.component}/{update.module}" if update.component else update.module
