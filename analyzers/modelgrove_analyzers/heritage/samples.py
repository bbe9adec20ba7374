"""What the sampled values and the norms of two models say about a cast between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelgrove_analyzers.heritage.facts import Facts, numel
from modelgrove_analyzers.heritage.rounding import MANTISSA, ROUNDINGS, Rounding, precision, rounding_variance, spacing

_SIGMAS = 8.0
_NORM_ERROR = 4e-6
"""Twice the relative error of a stored norm, squared norms being compared."""


@dataclass(frozen=True)
class CastMatch:
    """The cast that explains most samples of a copy, and how well."""

    rounding: Rounding
    samples: int
    agreeing: float
    """Share of the samples that are exactly the original's, rounded."""
    deviation: float
    """The largest distance from the original, in steps of the cast's type."""
    cosine: float
    relative: float

    def evidence(self) -> dict[str, Any]:
        """For the report."""
        return {
            "samples": self.samples,
            "agreeing": self.agreeing,
            "largest_deviation_steps": self.deviation,
            "cosine": self.cosine,
            "relative_change": self.relative,
        }


def best_cast(fine: Facts, coarse: Facts, keys: Mapping[str, str]) -> CastMatch:
    """Try every cast on the samples of the tensors `keys` (of `fine` → of `coarse`)."""
    x, y = _samples(fine, keys), _samples(coarse, keys.values())
    if len(x) != len(y) or not len(x):
        return CastMatch(ROUNDINGS[0], 0, 0.0, 0.0, 0.0, 0.0)
    shares = {rounding: float((rounding.apply(x) == y.float()).double().mean()) for rounding in ROUNDINGS}
    rounding, agreeing = max(shares.items(), key=lambda item: item[1])
    return CastMatch(
        rounding=rounding,
        samples=len(x),
        agreeing=agreeing,
        deviation=float(((x - y).abs() / spacing(x, rounding.dtype)).max()),
        cosine=float(torch.nn.functional.cosine_similarity(x, y, dim=0)),
        relative=float((y - x).norm() / x.norm()) if bool(x.any()) else 0.0,
    )


def fineness(facts: Facts, keys: Iterable[str]) -> tuple[bool, int]:
    """For ordering: what is packed is coarser than anything, though scale × code has all digits of a float32."""
    return not facts.packed, MANTISSA[precision(_samples(facts, keys))]


def norms_agree(fine: Facts, coarse: Facts, keys: Mapping[str, str], rounding: Rounding) -> bool:
    """Whether each tensor's norm changed by no more than rounding changes it.

    ‖W + E‖² − ‖W‖² = 2⟨W, E⟩ + ‖E‖², with independent errors Eᵢ uniform in a step sᵢ: its mean is
    Σ sᵢ²/12 and its variance about Σ 4 Wᵢ² sᵢ²/12; both sums are estimated from the samples.
    """
    for key, other in keys.items():
        mine, theirs = fine.tensors[key], coarse.tensors[other]
        if mine.norm is None or theirs.norm is None:
            continue
        values = torch.from_numpy(mine.sketch).double()
        noise = rounding_variance(values, rounding.dtype)
        count = numel(mine)
        spread = sqrt(4 * count * float((values.square() * noise).mean()))
        surprise = theirs.norm**2 - mine.norm**2 - count * float(noise.mean())
        # The mean noise is itself estimated from 64 samples, so it may be off by half.
        if abs(surprise) > _SIGMAS * spread + 0.5 * count * float(noise.mean()) + _NORM_ERROR * mine.norm**2:
            return False
    return True


def _samples(facts: Facts, keys: Iterable[str]) -> Tensor:
    """All float samples of the tensors, (n,) float64."""
    parts = [facts.tensors[key].sketch for key in keys]
    return torch.from_numpy(np.nan_to_num(np.concatenate(parts or [np.empty(0, np.float32)]))).double()
