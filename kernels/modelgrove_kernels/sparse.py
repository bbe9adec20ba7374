"""Updates that change single entries of a matrix: brought onto common places, they are short vectors.

Entries of an update (m, n) are places (k,), int64, rising, counted row by row, and values (k,), float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BITS = 16
"""Of a float32 that magnitudes are counted by: sign, exponent and seven bits of the mantissa."""
_LARGEST = 0x7F7F
"""The upper bits of the largest finite numbers."""

Entries = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Support:
    """The places (k,) that updates of shape (m, n) change; in it an update is a row (1, k)."""

    places: Tensor
    shape: tuple[int, int]

    def lift(self, inner: Tensor) -> Tensor:
        """The matrix (m, n) of a row (1, k), zero elsewhere."""
        whole = inner.new_zeros(self.shape[0] * self.shape[1])
        whole[self.places] = inner[0]
        return whole.view(self.shape)


def gather(updates: Sequence[Entries], shape: tuple[int, int]) -> tuple[Support, tuple[Tensor, ...]]:
    """The places that any of the updates changes, and each update as a row (1, k) there, zero where it changes none."""
    places = torch.unique(torch.cat([own for own, _ in updates]))
    rows = []
    for own, values in updates:
        row = values.new_zeros(1, len(places))
        row[0, torch.searchsorted(places, own)] = values
        rows.append(row)
    return Support(places, shape), tuple(rows)


def threshold_of(weights: Iterable[Tensor], share: float) -> float:
    """The largest number with seven bits of mantissa such that at most `share` of all weights are smaller by magnitude.

    Weights are counted by the upper half of their float32 bits, so that one pass is enough: the number is at most 1/128
    below the exact quantile. It is at least the smallest that has weights below it, however many those are.
    """
    counts = np.zeros(2 ** (_BITS - 1) + 1, np.int64)
    for weight in weights:
        bits = weight.detach().float().abs().contiguous().numpy().ravel().view(np.uint32) >> (32 - _BITS)
        counts[1:] += np.bincount(bits, minlength=len(counts) - 1)
    below = counts.cumsum()  # below[i]: weights that are smaller than the number with the upper bits i
    place = int(np.searchsorted(below, share * below[-1], side="right")) - 1
    lowest = int(np.flatnonzero(below)[0])
    upper = np.uint32(min(max(place, lowest), _LARGEST))
    return float((upper << np.uint32(32 - _BITS)).view(np.float32))
