"""Put the hidden units of a copy back into the order and scale of a reference.

Permuting the hidden units of a network, and scaling one layer up and the next one down, leaves what it computes as it
was, and moves every weight. The order is found again by comparing units with those of a reference: which rows feed a
unit and which columns it feeds, by cosine, so that scale has no say; then the best assignment (Hungarian).

The reference must not depend on the key. Aligned to the marked model, the units of any model are picked to look like
the mark, and the p-value is worth nothing; so whoever calls this gives the unmarked reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from modelgrove_hub.contracts import Context, InputModel, LazyTensor
from modelgrove_plugins.compress.targets import FLOATS
from modelgrove_plugins.verify.reading import Unpacked

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-30
_HEAD = 8
"""Widths of attention heads are multiples of it, so channels may change places inside such a block."""
_NORM_GROUPS = 32
"""Group norms have 32 groups, or fewer that it is a multiple of."""


@dataclass(frozen=True)
class Side:
    """Weights of a group of units in a tensor: block `copy` of as many rows (axis 0) or columns (axis 1) as units."""

    tensor: str
    axis: int
    copy: int = 0

    def of(self, values: Tensor, units: int) -> Tensor:
        """A view (units, rest…) of the tensor's values."""
        return values.movedim(self.axis, 0)[self.copy * units : (self.copy + 1) * units]


@dataclass(frozen=True)
class Units:
    """Hidden units that change places together, and all weights that belong to them."""

    name: str
    count: int
    block: int
    """Units may change places inside blocks of this size without changing what the network computes."""
    sides: tuple[Side, ...]
    up: tuple[Side, ...] = ()
    """To scale up, while `down` is scaled down, changes nothing either; empty where that is not so."""
    down: tuple[Side, ...] = ()


@dataclass(frozen=True)
class Move:
    """New places of one side's units: unit `order[j]` comes to j, times `factor[j]`."""

    side: Side
    order: Tensor
    factor: Tensor


@dataclass(frozen=True)
class _Rule:
    """Layers whose rows are one unit each, in diffusers' names, and the layer that reads them."""

    layers: tuple[str, ...]
    reader: str
    axis: int
    """Of the reader: 1 if it reads units by columns, 0 if it has them as rows, as keys have the queries' order."""


_RULES = (
    _Rule(("ff.net.0.proj",), "ff.net.2", 1),
    _Rule(("to_v",), "to_out.0", 1),
    _Rule(("to_q",), "to_k", 0),
    _Rule(("conv1", "time_emb_proj", "norm2"), "conv2", 1),
)


def units_of(tensors: Mapping[str, LazyTensor]) -> Iterator[Units]:
    """Units of feed-forward layers, of attention's values, of its queries with keys, and inside residual blocks."""
    for name in sorted(tensors):
        for rule in _RULES:
            if name.endswith(f"{rule.layers[0]}.weight"):
                stem = name.removesuffix(f"{rule.layers[0]}.weight")
                if (stem == "" or stem.endswith((".", "/"))) and (found := _units(stem, rule, tensors)):
                    yield found


def _units(stem: str, rule: _Rule, tensors: Mapping[str, LazyTensor]) -> Units | None:
    reader = tensors.get(f"{stem}{rule.reader}.weight")
    if reader is None or len(reader.shape) < 2 or reader.dtype not in FLOATS or f"{stem}norm_q.weight" in tensors:
        return None
    count = reader.shape[rule.axis]
    sides = [Side(reader.name, rule.axis)]
    layers = (*rule.layers, rule.reader) if rule.axis == 0 else rule.layers
    for layer in layers:
        for parameter in ("weight", "bias"):
            tensor = tensors.get(f"{stem}{layer}.{parameter}")
            if tensor is None or tensor is reader:
                continue
            copies, rest = divmod(tensor.shape[0], count)
            if rest or not copies or tensor.dtype not in FLOATS:
                return None
            sides += [Side(tensor.name, 0, copy) for copy in range(copies)]
    block = {"conv2": count // _NORM_GROUPS, "ff.net.2": count}.get(rule.reader, _HEAD)
    if not block or count % block:
        return None
    gated, attention = any(side.copy for side in sides), rule.layers[0] in ("to_v", "to_q")
    if attention and gated:
        return None  # heads that share keys and values
    # The first half of a gated layer (GEGLU) is linear, the second is not.
    linear = attention or (rule.reader == "ff.net.2" and gated)
    up = tuple(side for side in sides if side.tensor.startswith(f"{stem}{rule.layers[0]}.") and not side.copy)
    down = tuple(side for side in sides if side.tensor.startswith(f"{stem}{rule.reader}."))
    return Units(stem + rule.layers[0], count, block, tuple(sides), *((up, down) if linear else ()))


class Aligned:
    """Reads tensors of `model` in the order and scale of the units of `reference`."""

    def __init__(self, context: Context, model: InputModel, reference: InputModel) -> None:
        mine, theirs = dense_tensors(model), dense_tensors(reference)
        self._moves: dict[str, list[Move]] = {}
        self.moved, self.units = 0, 0
        groups = [units for units in units_of(mine) if all(_fits(mine, theirs, side.tensor) for side in units.sides)]
        for number, units in enumerate(groups):
            context.progress(0.5 + 0.1 * number / len(groups), f"aligning {units.name}")
            self._align(units, mine, theirs)

    def read(self, name: str, values: Tensor) -> Tensor:
        """The tensor's values in the reference's order; as they are where nothing was matched."""
        return rearranged(values, self._moves.get(name, ()))

    def _align(self, units: Units, mine: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor]) -> None:
        import torch

        wide = [side for side in units.sides if len(mine[side.tensor].shape) > 1]
        pairs = [(_features(side, units, mine), _features(side, units, theirs)) for side in wide]
        likeness = [_unit(there) @ _unit(here).T for here, there in pairs]
        order = best_order(torch.stack([one.abs() for one in likeness]).sum(0))
        self.units += units.count
        self.moved += int((order != torch.arange(units.count)).sum())
        factors: dict[tuple[str, int], Tensor] = {}
        for side, (here, there), alike in zip(wide, pairs, likeness, strict=True):
            signs = torch.where(alike.gather(1, order[:, None])[:, 0] < 0, -1.0, 1.0)
            sizes = there.norm(dim=1) / here.norm(dim=1)[order].clamp_min(_TINY)
            factors[_layer(side), side.copy] = signs * sizes
        for side in units.sides:
            factor = factors.get((_layer(side), side.copy), torch.ones(units.count))  # a norm has no columns
            self._moves.setdefault(side.tensor, []).append(Move(side, order, factor))


def rearranged(values: Tensor, moves: Iterable[Move]) -> Tensor:
    """A tensor's values, float32, with all moves made one after the other."""
    values = values.float().clone()
    for move in moves:
        part = move.side.of(values, len(move.order))
        part.copy_(part[move.order] * move.factor.view(-1, *[1] * (part.ndim - 1)))
    return values


def best_order(likeness: Tensor) -> Tensor:
    """For every row of (n, n) a column of its own, so that their sum is largest: (n,) int64."""
    import torch

    nearest = likeness.argmax(1)
    if len(set(nearest.tolist())) == len(nearest):
        return nearest  # every row has its best: no assignment is better
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])


def dense_tensors(model: InputModel) -> dict[str, LazyTensor]:
    """A model's tensors by name, packed ones as what they stand for."""
    return {tensor.name: tensor for tensor in cast("InputModel", Unpacked(model)).tensors()}


def _fits(mine: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor], name: str) -> bool:
    return name in theirs and mine[name].shape == theirs[name].shape


def _layer(side: Side) -> str:
    return side.tensor.rpartition(".")[0]


def _features(side: Side, units: Units, tensors: Mapping[str, LazyTensor]) -> Tensor:
    return side.of(tensors[side.tensor].read().float(), units.count).flatten(1)


def _unit(rows: Tensor) -> Tensor:
    found: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(_TINY)
    return found
