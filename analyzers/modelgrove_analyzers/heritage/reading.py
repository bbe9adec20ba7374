"""Read two models in full where their sketches leave it open: only a whole match is called a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from modelgrove_analyzers.heritage.facts import key, lazy_tensors, plain_files, weight_files
from modelgrove_analyzers.heritage.rounding import MANTISSA, ROUNDINGS, GridFit, Rounding, fit_grid, lies_on_grid
from modelgrove_analyzers.heritage.unpacking import PackedSource, packed_sources
from modelgrove_analyzers.heritage.verdict import Kind, Verdict
from modelgrove_hub.contracts import InputModel
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.store.tensors import StoredTensor, tensors_of

_WITHIN = 0.9995
"""Share of values within half a grid step from which a model is a grid copy; below `_PERHAPS` it is none."""
_PERHAPS = 0.98
_NEARLY = 0.999
_CHUNK = 1 << 20
_PROBED = 3


class Pair(NamedTuple):
    """A tensor of the parent and its counterpart in the child; `packed` when that is quantized in our format."""

    original: StoredTensor
    copy: StoredTensor
    packed: PackedSource | None


@dataclass
class _Count:
    """What was read so far."""

    values: int = 0
    agreeing: float = 0.0
    largest: float = 0.0
    levels: int = 0
    groups: frozenset[int] = frozenset()
    forms: frozenset[str] = frozenset()
    """What packed tensors say they are."""


def confirm(
    verdict: Verdict, parent: InputModel, child: InputModel, temp: Path, progress: Callable[[], None]
) -> Verdict:
    """The verdict after reading every tensor that differs; packed files are unpacked into `temp`.

    A cast must hold for every single value. Otherwise each tensor must lie on a grid within
    half a step of the original, or be cast.
    """
    mine, theirs = (lazy_tensors(plain_files(model, temp)) for model in (parent, child))
    packed = {
        key(path, name): s for path, file in weight_files(child).items() for name, s in packed_sources(file).items()
    }
    pairs = [Pair(mine[one], theirs[other], packed.get(other)) for one, other in verdict.pairs.items()]
    if verdict.rounding is not None:
        return _confirm_cast(verdict, pairs, verdict.rounding, progress)
    return _confirm_grid(verdict, pairs, progress)


def is_gridded(model: InputModel) -> bool:
    """Whether one of the model's largest matrices lies on an integer grid; packed files do by their format."""
    tensors: list[StoredTensor] = []
    for file in weight_files(model).values():
        if manifest_of(file):
            return True
        tensors += [tensor for tensor in tensors_of(file) if len(tensor.shape) >= 2 and tensor.dtype in MANTISSA]
    largest = sorted(tensors, key=lambda tensor: -tensor.nbytes)[:_PROBED]
    return any(lies_on_grid(tensor.read(), tensor.dtype) for tensor in largest if tensor.nbytes)


def _confirm_cast(verdict: Verdict, pairs: list[Pair], rounding: Rounding, progress: Callable[[], None]) -> Verdict:
    # Some casts agree in nearly all values: the samples may have named the wrong one.
    agreeing = dict.fromkeys(ROUNDINGS, 0)
    values = 0
    for original, copy, _ in pairs:
        progress()
        x, y = original.read().flatten(), copy.read().flatten()
        values += y.numel()
        kept = x.double() == y.double()
        for way in agreeing:
            agreeing[way] += int(((way.apply(x) == y.float()) | kept).sum())
        agreeing = {way: count for way, count in agreeing.items() if count >= _PERHAPS * values or way == rounding}
    way, count = max(agreeing.items(), key=lambda item: item[1])
    share = count / max(values, 1)
    found = replace(
        verdict, rounding=way, evidence={**verdict.evidence, "values_read": values, "values_agreeing": share}
    )
    if count == values:
        return replace(found, kind=Kind.QUANTIZED if way.casts else Kind.RESAVED)
    # Some values of the very same type are different: that is an edit, however small.
    return replace(found, kind=Kind.UNDECIDED if share >= _NEARLY and way.casts else Kind.NONE)


def _confirm_grid(verdict: Verdict, pairs: list[Pair], progress: Callable[[], None]) -> Verdict:
    count = _Count()
    # The largest first: a model that is on no grid is found out by its first tensor.
    for pair in sorted(pairs, key=lambda pair: -pair.copy.nbytes):
        progress()
        if not _read_tensor(pair, count):
            break
    else:
        share = count.agreeing / max(count.values, 1)
        grid = " and ".join(sorted(count.forms)) or ("int4" if count.levels <= 16 else "int8")
        evidence = {
            **verdict.evidence, "values_read": count.values, "values_agreeing": share, "levels": count.levels,
            "largest_deviation_steps": count.largest, "groups": sorted(count.groups),
        }  # fmt: skip
        if count.levels and share >= _WITHIN:
            return replace(verdict, kind=Kind.QUANTIZED, grid=grid, evidence=evidence)
        if count.levels and share >= _PERHAPS:
            return replace(verdict, kind=Kind.UNDECIDED, grid=grid, evidence=evidence)
        return replace(verdict, kind=Kind.NONE, evidence=evidence)
    return replace(verdict, kind=Kind.NONE, evidence={**verdict.evidence, "no_grid": pair.copy.name})


def _read_tensor(pair: Pair, count: _Count) -> bool:
    """Count one tensor; False when it is neither on a grid nor a cast of the original."""
    x, y = pair.original.read(), pair.copy.read()
    x = x.reshape(y.shape)
    if pair.packed is not None:
        count.forms |= {pair.packed.entry.form}
        return _add(count, pair.packed.fit(x), y.numel())
    if any(bool((r.apply(x) == y.float()).all()) for r in ROUNDINGS):
        count.values, count.agreeing = count.values + y.numel(), count.agreeing + y.numel()
        return True
    if y.ndim < 2 or pair.copy.dtype not in MANTISSA:
        return False
    return all(_add(count, fit_grid(x[rows], y[rows], pair.copy.dtype), y[rows].numel()) for rows in _chunks(y))


def _add(count: _Count, fit: GridFit | None, values: int) -> bool:
    if fit is None:
        return False
    count.values += values
    count.agreeing += fit.within * values
    count.largest, count.levels = max(count.largest, fit.largest), max(count.levels, fit.levels)
    count.groups |= {fit.group}
    return True


def _chunks(tensor: Tensor) -> Iterator[slice]:
    """Slices of rows of about a million elements, which bounds the memory that a fit needs."""
    height = max(1, _CHUNK // max(1, tensor[0].numel()))
    edges = [*range(0, len(tensor), height), len(tensor)]
    yield from (slice(start, end) for start, end in pairwise(edges))
