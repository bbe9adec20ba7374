"""Whether adapters grew from the network that they are merged for, told by weights: shapes fit any of a family."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapters import FLOATS
from modelgrove_hub.formats.slots import Slot, slots_of
from modelgrove_hub.registry.kinship import FEWEST, RELATED, UNRELATED

_ASKED = 4
"""Matrices that are compared: of unrelated networks not one correlates, of relatives all do."""


def check_origins(models: Sequence[InputModel], base: InputModel | None, names: Collection[str]) -> list[str]:
    """Compare the bases that the registry is sure of with `base`, or with each other where there is none.

    `names` are those of the slots that the adapters change. Returns warnings of bases that are hardly related.

    Raises:
        UsageError: a base is another network, whose weights have nothing to do with these.
    """
    grown = [(model, model.base) for model in models if model.base is not None]
    if not grown:
        return []
    target = base or grown[0][1]
    warnings = []
    for model, origin in grown:
        score = None if _same(origin, target) else _correlation(origin, target, names)
        if score is None or score >= RELATED:
            continue
        said = (
            f"{model.name} grew from {origin.name}, by its weights; those of {target.name} correlate with them "
            f"by {score:.2f}"
        )
        if score < UNRELATED:
            raise UsageError(f"{said}: another network, where its update means nothing. Take a base of its own tree")
        warnings.append(f"{said}: hardly related, so look at pictures of the result")
    return warnings


def _same(one: InputModel, other: InputModel) -> bool:
    return (one.name, one.revision_id) == (other.name, other.revision_id)


def _correlation(one: InputModel, other: InputModel, names: Collection[str]) -> float | None:
    """The mean correlation of a few matrices that both have; None if there is none that says anything."""
    mine, theirs = slots_of(one), slots_of(other)
    common = [name for name in sorted(names) if name in mine and name in theirs and _alike(mine[name], theirs[name])]
    scores = []
    for name in common[:: max(1, len(common) // _ASKED)][:_ASKED]:
        a, b = (slots[name].read().flatten() for slots in (mine, theirs))
        a, b = a - a.mean(), b - b.mean()
        length = float(a.norm()) * float(b.norm())
        if length > 0:
            scores.append(float(a @ b) / length)
    return sum(scores) / len(scores) if scores else None


def _alike(one: Slot, other: Slot) -> bool:
    """Whether both are matrices of one shape, not codes, and large enough not to correlate by chance."""
    floats = one.tensor.dtype in FLOATS and other.tensor.dtype in FLOATS
    return floats and one.shape == other.shape and one.shape[0] > 1 and prod(one.shape) >= FEWEST
