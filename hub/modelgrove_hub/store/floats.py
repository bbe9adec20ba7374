"""Stored numbers as NumPy arrays, without torch: widening small floats, and the L2 norm of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelgrove_hub.store.dtypes import DTYPES, Dtype, SmallFloat

Bytes = NDArray[np.uint8]

BLOCK = 2**16
"""Elements whose squares are summed at a time: few enough for the processor's cache."""
_TINY, _HUGE = 1e-25, 1e38
"""A sum of squares outside may have lost digits to float32's range, or be no number."""


def decode(dtype: str, raw: Bytes) -> NDArray[Any]:
    """The values that `raw` (n bytes of `dtype`, a type of at least a byte) holds, flat.

    Floats of 8 and 16 bits become float32, exactly; the others stay what they are.
    """
    items: NDArray[Any] = raw.view(DTYPES[dtype].numpy)
    with np.errstate(over="ignore", invalid="ignore"):
        if small := DTYPES[dtype].small:
            return _widen(items, small)
        if dtype == "F8_E8M0":
            return _powers_of_two(items)
    return items.view(np.bool_) if dtype == "BOOL" else items


def _widen(items: NDArray[Any], small: SmallFloat) -> NDArray[np.float32]:
    magnitude = items.astype(np.uint32)
    sign = magnitude > small.magnitude
    magnitude &= np.uint32(small.magnitude)
    values = (magnitude << np.uint32(small.shift)).view(np.float32) * np.float32(2.0**small.scale)
    if small.negative_zero_is_nan:
        values[sign & (magnitude == 0)] = nan
    infinite = magnitude >= small.nonfinite
    if infinite.any():
        has_infinity = small.nonfinite != small.magnitude
        values[infinite] = np.where((magnitude[infinite] == small.nonfinite) & has_infinity, np.inf, nan)
    np.negative(values, out=values, where=sign)
    return values


def _powers_of_two(items: NDArray[Any]) -> NDArray[np.float32]:
    exponents = items.astype(np.int32)
    values = np.ldexp(np.float32(1.0), exponents - 127)
    values[exponents == 255] = nan
    return values


class NormMeter:
    """The L2 norm of values that come in pieces, each a whole number of elements.

    Relative error about 1e-6: squares are summed pairwise in float32 within a block, blocks are
    joined in float64. Small floats are widened by magnitude alone, as a norm needs no sign.
    Call it under `np.errstate(over="ignore", invalid="ignore")`.

    Args:
        kind: a float type.
        scratch: room to compute in, at least twice `BLOCK` items.
    """

    def __init__(self, kind: Dtype, scratch: NDArray[np.uint32]) -> None:
        self._kind = kind
        self._scratch = scratch
        self._norm = 0.0

    def update(self, raw: Bytes) -> None:
        """Add the next values."""
        items: NDArray[Any] = raw.view(self._kind.numpy)
        for start in range(0, items.size, BLOCK):
            self._add(items[start : start + BLOCK], self._kind.small)

    @property
    def norm(self) -> float | None:
        """The norm so far, to nine digits; None when a value was infinite or not a number."""
        return _round(self._norm)

    def _add(self, items: NDArray[Any], small: SmallFloat | None) -> None:
        values = _magnitudes(items, small, self._scratch) if small else items
        squares = self._scratch.view(values.dtype)[: values.size]
        total = float(np.add.reduce(np.multiply(values, values, out=squares)))
        # A value that is not finite adds at least `limit`, so most blocks need no further look.
        if _TINY < total < (small.limit if small else _HUGE):
            self._norm = hypot(self._norm, sqrt(total))
        elif small and _has_nonfinite(items, small):
            self._norm = nan
        else:  # widened again: the squares lie where the values were
            values = _magnitudes(items, small, self._scratch) if small else items
            self._norm = hypot(self._norm, _scaled_norm(values))


def norms_of(kind: Dtype, raw: Bytes, counts: Sequence[int], scratch: NDArray[np.uint32]) -> list[float | None]:
    """The norms of many small tensors that lie one after another in `raw`, as `NormMeter` would give them.

    Args:
        kind: their float type.
        raw: their bytes.
        counts: elements of each, none of them zero.
        scratch: at least as many items as `raw` has elements.
    """
    items: NDArray[Any] = raw.view(kind.numpy)
    values = _magnitudes(items, kind.small, scratch) if kind.small else items
    starts = np.cumsum([0, *counts[:-1]])
    totals = np.add.reduceat(np.multiply(values, values, dtype=np.float64), starts)
    floor = -1.0 if values.dtype == np.float32 else _TINY  # float64 loses no square of a float32
    limit = kind.small.limit if kind.small else _HUGE
    norms: list[float | None] = []
    for start, count, total in zip(starts.tolist(), counts, totals.tolist(), strict=True):
        if floor < total < limit:
            norm = sqrt(total)
        elif kind.small and _has_nonfinite(items[start : start + count], kind.small):
            norm = nan
        else:
            norm = _scaled_norm(values[start : start + count])
        norms.append(_round(norm))
    return norms


def _magnitudes(items: NDArray[Any], small: SmallFloat, scratch: NDArray[np.uint32]) -> NDArray[np.float32]:
    bits = scratch[: items.size]
    np.bitwise_and(items, items.dtype.type(small.magnitude), out=bits)
    bits *= np.uint32(1 << small.shift)  # a shift, but NumPy's own shift is slow
    values = bits.view(np.float32)
    if small.scale:
        values *= np.float32(2.0**small.scale)
    return values


def _round(norm: float) -> float | None:
    return float(f"{norm:.9g}") if norm < np.inf else None


def _has_nonfinite(items: NDArray[Any], small: SmallFloat) -> bool:
    if small.negative_zero_is_nan:
        return bool((items == small.magnitude + 1).any())
    return bool((items & items.dtype.type(small.magnitude)).max(initial=0) >= small.nonfinite)


def _scaled_norm(values: NDArray[Any]) -> float:
    if not values.any():
        return 0.0
    largest = float(np.abs(values).max())
    if not largest < np.inf:
        return nan
    scaled = values.astype(np.float64) / largest
    return largest * sqrt(float((scaled * scaled).sum()))
