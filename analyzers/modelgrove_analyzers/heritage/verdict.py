"""Is one model a copy of another? A verdict from what ingest measured, without reading weights.

Casts are tested exactly: every sampled value of the copy must be the rounded sampled value of the
original, and the norms of all tensors must agree within what rounding does to a norm. A
fine-tune fails both as soon as it moves more than a sliver of a rounding step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from modelgrove_analyzers.heritage.facts import Facts, numel
from modelgrove_analyzers.heritage.matching import match
from modelgrove_analyzers.heritage.rounding import Rounding
from modelgrove_analyzers.heritage.samples import CastMatch, best_cast, fineness, norms_agree

MIN_SAMPLES = 256
"""Fewer telling samples than this decide nothing: four tensors' worth."""
_COVERED = 0.999
"""Share of a copy's telling parameters that must have a counterpart."""
_NEARLY = 0.999
"""From this share of agreeing samples on, a pair that is no copy is called undecided."""
_ALIKE = 0.97
"""Cosine of all samples from which a pair may be an original and its integer quantization."""
_LOOKED_AT = 4
_APART = 0.8


class Kind(StrEnum):
    """What two models are to each other."""

    EXACT = "exact copy"
    RESAVED = "re-saved copy"
    RENAMED = "renamed copy"
    PART = "part"
    QUANTIZED = "quantized copy"
    UNDECIDED = "undecided"
    SUSPECT = "suspect"
    """Alike, and no cast: perhaps an integer quantization, which only a reading can tell from a fine-tune."""
    NONE = "none"


@dataclass(frozen=True)
class Verdict:
    """What `child` is to `parent` (numbers of `Facts`), and why we think so."""

    kind: Kind
    parent: int
    child: int
    grid: str = ""
    """The grid that the child lies on, "int8" or "int4"; of packed files all forms, as "int4 and sparse"."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    """Keys of the parent's tensors → keys of the child's, for tensors that differ: what a full reading reads."""
    rounding: Rounding | None = None
    """The cast that the samples speak for."""

    def turned(self) -> Verdict:
        """The same with parent and child exchanged."""
        pairs = {other: key for key, other in self.pairs.items()}
        return replace(self, parent=self.child, child=self.parent, pairs=pairs)

    @property
    def precision(self) -> str:
        """To what the child was rounded, in words; empty if it was not, or we cannot tell."""
        return self.grid or (self.rounding.name if self.rounding and self.rounding.casts else "")


_COPIES = (Kind.QUANTIZED, Kind.RESAVED)


def compare(a: Facts, b: Facts) -> Verdict:
    """The verdict on two models; parent is the more precise one, among equals the earlier one."""
    first, second = sorted((a, b), key=lambda facts: (facts.revision_id, facts.number))
    for kind, same in (
        (Kind.EXACT, a.files == b.files),
        (Kind.RESAVED, a.weights_hash == b.weights_hash),
        (Kind.RENAMED, a.values_hash == b.values_hash),
    ):
        if same and a.tensors:
            return Verdict(kind, first.number, second.number, evidence={"tensors": len(a.tensors)})
    if _clearly_apart(first, second):
        return Verdict(Kind.NONE, first.number, second.number)
    pairs = match(first, second)
    differing = {key: other for key, other in pairs.items() if not _equal(first, key, second, other)}
    if (
        not any(key in first.sketches for key in pairs)
        or max(_covered(first, pairs), _covered(second, pairs.values())) < _COVERED
    ):
        return Verdict(Kind.NONE, first.number, second.number, evidence={"shared_tensors": len(pairs)})
    if not differing:
        return _part(first, second, pairs)
    return _rounded(first, second, pairs, differing)


def _clearly_apart(a: Facts, b: Facts) -> bool:
    """Whether the largest tensors that both name are unlike: most pairs of a hub end here."""
    keys = [key for key in a.sketches if key in b.sketches and len(a.sketches[key]) == len(b.sketches[key])]
    if not keys or a.telling_hashes & b.telling_hashes:
        return False
    x, y = (np.concatenate([facts.sketches[key] for key in keys[:_LOOKED_AT]]) for facts in (a, b))
    return float(x @ y) < _APART * float(np.linalg.norm(x) * np.linalg.norm(y))


def _equal(a: Facts, key: str, b: Facts, other: str) -> bool:
    mine, theirs = a.tensors[key], b.tensors[other]
    return mine.sha256 == theirs.sha256 and mine.dtype == theirs.dtype


def _covered(facts: Facts, keys: Iterable[str]) -> float:
    """The share of the model's telling parameters that stand in `keys`."""
    chosen = set(keys)
    total = sum(numel(facts.tensors[key]) for key in facts.sketches)
    return sum(numel(facts.tensors[key]) for key in facts.sketches if key in chosen) / max(total, 1)


def _part(first: Facts, second: Facts, pairs: Mapping[str, str]) -> Verdict:
    """All that both have is equal: the one that is covered is a part of the other."""
    inside = _covered(second, pairs.values()) >= _COVERED
    whole, part = (first, second) if inside else (second, first)
    evidence = {
        "tensors": len(pairs),
        "left_out": len(whole.tensors) - len(pairs),
        "added": len(part.tensors) - len(pairs),
    }
    samples = sum(len(part.sketches[key]) for key in part.sketches)
    kind = Kind.PART if samples >= MIN_SAMPLES else Kind.UNDECIDED
    return Verdict(kind, whole.number, part.number, evidence=evidence)


def _rounded(first: Facts, second: Facts, pairs: Mapping[str, str], differing: Mapping[str, str]) -> Verdict:
    """Whether one model's samples are the other's, rounded."""
    fine, coarse, keys = first, second, dict(differing)
    if fineness(second, differing.values()) > fineness(first, differing):
        fine, coarse, keys = second, first, {other: key for key, other in differing.items()}
    found = best_cast(fine, coarse, keys)
    covered = _covered(coarse, pairs.values() if coarse is second else pairs) >= _COVERED
    kind = _judge(found, [fine.tensors[key].dtype == coarse.tensors[other].dtype for key, other in keys.items()])
    if kind in _COPIES and (found.samples < MIN_SAMPLES or not covered):
        kind, keys = Kind.UNDECIDED, {}
    elif kind in _COPIES and not norms_agree(fine, coarse, keys, found.rounding):
        kind = Kind.UNDECIDED
    evidence = {"tensors_equal": len(pairs) - len(differing), "tensors_rounded": len(differing), **found.evidence()}
    named = None if kind in (Kind.SUSPECT, Kind.NONE) else found.rounding
    return Verdict(kind, fine.number, coarse.number, evidence=evidence, pairs=keys, rounding=named)


def _judge(found: CastMatch, same_types: Sequence[bool]) -> Kind:
    if found.agreeing == 1.0 and found.rounding.casts:
        return Kind.QUANTIZED
    if found.agreeing == 1.0:
        # Samples are equal and bytes are not: of one type, that is an edit; of two, the same values in another type.
        return Kind.NONE if any(same_types) else Kind.RESAVED
    if found.agreeing >= _NEARLY:
        return Kind.UNDECIDED
    return Kind.SUSPECT if found.cosine >= _ALIKE else Kind.NONE
