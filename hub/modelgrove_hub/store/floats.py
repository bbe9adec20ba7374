"""Stored numbers as NumPy arrays, without torch: widening small floats, and the L2 norm of a stream."""

from __future__ import annotations

from math import hypot, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelgrove_hub.store.dtypes import DTYPES, SmallFloat

Bytes = NDArray[np.uint8]


def decode(dtype: str, raw: Bytes) -> NDArray[Any]:
    """The values that `raw` (n bytes of `dtype`, a type of at least a byte) holds, flat.

    Floats of 8 and 16 bits become float32, exactly; the others stay what they are.
    """
    items = raw.view(DTYPES[dtype].numpy)
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

    Relative error about 1e-6: squares are summed pairwise in float32 within a piece, pieces are
    joined in float64. Small floats are widened by magnitude alone, as a norm needs no sign.

    Args:
        dtype: a float type of DTYPES.
        scratch: room to compute in, as many items as the largest piece has bytes. Keep it so
            small that it stays in the processor's cache.
    """

    def __init__(self, dtype: str, scratch: NDArray[np.uint32]) -> None:
        self._kind = DTYPES[dtype]
        self._scratch = scratch
        self._norm = 0.0

    def update(self, raw: Bytes) -> None:
        """Add the next values."""
        items = raw.view(self._kind.numpy)
        values = self._widen(items)
        if values is None:
            self._norm = nan
            return
        squares = self._scratch.view(values.dtype)[: values.size]
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.multiply(values, values, out=squares).sum())
        if _SAFE[0] < total < _SAFE[1]:
            self._norm = hypot(self._norm, sqrt(total))
        else:  # widened again: the squares lie where the values were
            self._norm = hypot(self._norm, _scaled_norm(self._widen(items)))

    @property
    def norm(self) -> float | None:
        """The norm so far, to nine digits; None when a value was infinite or not a number."""
        return float(f"{self._norm:.9g}") if self._norm < np.inf else None

    def _widen(self, items: NDArray[Any]) -> NDArray[Any] | None:
        small = self._kind.small
        if small is None:
            return items
        bits = self._scratch[: items.size]
        np.bitwise_and(items, items.dtype.type(small.magnitude), out=bits)
        if bits.max(initial=0) >= small.nonfinite or (small.negative_zero_is_nan and (items == 0x80).any()):
            return None
        bits *= np.uint32(1 << small.shift)  # a shift, but NumPy's own shift is slow
        values = bits.view(np.float32)
        if small.scale:
            values *= np.float32(2.0**small.scale)
        return values


_SAFE = (1e-25, 1e38)
"""A sum of squares outside may have lost digits to float32's range, or be no number."""


def _scaled_norm(values: NDArray[Any]) -> float:
    largest = float(np.abs(values).max(initial=0))
    if largest == 0:
        return 0.0
    if not largest < np.inf:
        return nan
    scaled = values.astype(np.float64) / largest
    return largest * sqrt(float((scaled * scaled).sum()))
