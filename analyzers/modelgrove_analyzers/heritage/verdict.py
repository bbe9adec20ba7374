"""Is one model a copy of another? A verdict from what ingest measured, without reading weights.

Casts are tested exactly: every sampled value of the copy must be the rounded sampled value of the
original, and the norms of all tensors must agree within what rounding does to a norm. A
fine-tune fails both as soon as it moves more than a sliver of a rounding step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelgrove_analyzers.heritage.facts import Facts, numel
from modelgrove_analyzers.heritage.matching import match
from modelgrove_analyzers.heritage.rounding import MANTISSA, ROUNDINGS, Rounding, precision, spacing

MIN_SAMPLES = 256
"""Fewer telling samples than this decide nothing: four tensors' worth."""
_COVERED = 0.999
"""Share of a copy's telling parameters that must have a counterpart."""
_NEARLY = 0.9
"""From this share of agreeing samples on, a pair that is no clear copy is worth reading in full."""
_ALIKE = 0.97
"""Cosine of all samples from which a pair may be an original and its integer quantization."""
_LOOKED_AT = 4
_APART = 0.8
_SIGMAS = 8.0
_NORM_ERROR = 4e-6
"""Twice the relative error of a stored norm, squared norms being compared."""


class Kind(StrEnum):
    """What two models are to each other."""

    EXACT = "exact copy"
    RESAVED = "re-saved copy"
    RENAMED = "renamed copy"
    PART = "part"
    QUANTIZED = "quantized copy"
    UNDECIDED = "undecided"
    NONE = "none"


@dataclass(frozen=True)
class Verdict:
    """What `child` is to `parent` (numbers of `Facts`), and why we think so."""

    kind: Kind
    parent: int
    child: int
    grid: str = ""
    """Integer type of the grid that the child lies on: "int8" or "int4"."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    """Keys of the parent's tensors → keys of the child's, for tensors that differ: what a full reading reads."""
    rounding: Rounding | None = None
    """The cast that the samples speak for."""

    @property
    def precision(self) -> str:
        """To what the child was rounded, in words; empty if it was not, or we cannot tell."""
        return self.grid or (self.rounding.name if self.rounding and self.rounding.casts else "")


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
    """All that both have is equal: the smaller one is a part of the larger one."""
    whole, part = (first, second) if len(second.tensors) <= len(first.tensors) else (second, first)
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
    if _fineness(second, differing.values()) > _fineness(first, differing):
        fine, coarse, keys = second, first, {other: key for key, other in differing.items()}
    x, y = _samples(fine, keys), _samples(coarse, keys.values())
    rounding, agreeing = max(((r, _agreement(r, x, y)) for r in ROUNDINGS), key=lambda pair: pair[1])
    evidence: dict[str, Any] = {
        "tensors_equal": len(pairs) - len(differing),
        "tensors_rounded": len(differing),
        "samples": len(x),
        "agreeing": agreeing,
        "largest_deviation_steps": _deviation(rounding, x, y),
        "cosine": float(torch.nn.functional.cosine_similarity(x, y, dim=0)),
        "relative_change": float((y - x).norm() / x.norm()) if bool(x.any()) else 0.0,
    }
    kind = _judge(rounding, agreeing, evidence["cosine"], len(x))
    if kind is Kind.RESAVED and any(fine.tensors[key].dtype == coarse.tensors[keys[key]].dtype for key in keys):
        kind = Kind.UNDECIDED  # the same type and other bytes: a value was changed that is not sampled
    covered = _covered(coarse, pairs.values() if coarse is second else pairs)
    if kind in (Kind.QUANTIZED, Kind.RESAVED) and (
        covered < _COVERED or not _norms_agree(fine, coarse, keys, rounding)
    ):
        kind = Kind.UNDECIDED
    named = rounding if agreeing >= _NEARLY else None
    return Verdict(kind, fine.number, coarse.number, evidence=evidence, pairs=keys, rounding=named)


def _judge(rounding: Rounding, agreeing: float, cosine: float, samples: int) -> Kind:
    if agreeing == 1.0 and samples >= MIN_SAMPLES:
        return Kind.QUANTIZED if rounding.casts else Kind.RESAVED
    if agreeing >= _NEARLY or cosine >= _ALIKE:
        return Kind.UNDECIDED
    return Kind.NONE


def _samples(facts: Facts, keys: Iterable[str]) -> Tensor:
    """All float samples of the tensors, (n,) float64."""
    parts = [facts.tensors[key].sketch for key in keys]
    return torch.from_numpy(np.nan_to_num(np.concatenate(parts or [np.empty(0, np.float32)]))).double()


def _fineness(facts: Facts, keys: Iterable[str]) -> tuple[bool, int]:
    """What is packed is coarser than anything, though scale × code has all digits of a float32."""
    return not facts.packed, MANTISSA[precision(_samples(facts, keys))]


def _agreement(rounding: Rounding, x: Tensor, y: Tensor) -> float:
    if len(x) != len(y) or not len(x):
        return 0.0
    return float((rounding.apply(x) == y.float()).double().mean())


def _deviation(rounding: Rounding, x: Tensor, y: Tensor) -> float:
    if len(x) != len(y) or not len(x):
        return float("inf")
    return float(((x - y).abs() / spacing(x, rounding.dtype)).max())


def _norms_agree(fine: Facts, coarse: Facts, keys: Mapping[str, str], rounding: Rounding) -> bool:
    """Whether each tensor's norm changed by no more than rounding changes it.

    ‖W + E‖² − ‖W‖² = 2⟨W, E⟩ + ‖E‖², with independent errors Eᵢ uniform in a step sᵢ: its mean is
    Σ sᵢ²/12 and its variance about Σ 4 Wᵢ² sᵢ²/12; both sums are estimated from the samples.
    """
    for key, other in keys.items():
        mine, theirs = fine.tensors[key], coarse.tensors[other]
        if mine.norm is None or theirs.norm is None:
            continue
        values = torch.from_numpy(mine.sketch).double()
        noise = spacing(values, rounding.dtype).square() / 12
        count = numel(mine)
        spread = sqrt(4 * count * float((values.square() * noise).mean()))
        surprise = theirs.norm**2 - mine.norm**2 - count * float(noise.mean())
        # The mean noise is itself estimated from 64 samples, so it may be off by half.
        if abs(surprise) > _SIGMAS * spread + 0.5 * count * float(noise.mean()) + _NORM_ERROR * mine.norm**2:
            return False
    return True
