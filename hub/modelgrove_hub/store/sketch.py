"""What one tensor is known by: its hash, its norm, and a few of its values at public positions."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.floats import NormMeter

SAMPLES = 64
_SEED = b"modelgrove sketch 1"


@lru_cache(maxsize=4096)
def positions(numel: int) -> NDArray[np.int64]:
    """The sampled flat positions in any tensor of `numel` elements, rising: (min(64, numel),) int64.

    They depend on the number of elements alone, so the same weight is sampled at the same
    places in every model, whatever it is called there and however it is reshaped. One lies in
    each 64th of the tensor.
    """
    if numel <= SAMPLES:
        return np.arange(numel)
    starts = np.arange(SAMPLES + 1, dtype=np.int64) * numel // SAMPLES
    drawn = np.frombuffer(hashlib.shake_128(_SEED + numel.to_bytes(8, "little")).digest(8 * SAMPLES), "<u8")
    widths = np.diff(starts).astype(np.uint64)
    return starts[:-1] + (drawn % widths).astype(np.int64)


class TensorMeter:
    """Measures one tensor whose bytes come in pieces, each a whole number of elements.

    `scratch` is lent to `NormMeter`; `norm` and `samples` stay empty for types that are no floats.
    """

    def __init__(self, dtype: str, numel: int, scratch: NDArray[np.uint32]) -> None:
        kind = DTYPES[dtype]
        self._hash = hashlib.sha256()
        self._norm = NormMeter(kind, scratch) if kind.is_float else None
        self._item = _ITEMS.get(kind.bits, "u1")
        self._numel = numel
        self._done = 0
        self.samples = b""
        """The stored bytes of the values at `positions`, as far as they were seen."""

    def update(self, raw: NDArray[np.uint8]) -> None:
        """Add the next bytes, a flat uint8 array."""
        self._hash.update(raw)
        if self._norm:
            self._norm.update(raw)
            self._sample(raw.view(self._item))

    @property
    def sha256(self) -> str:
        """Of the bytes so far."""
        return self._hash.hexdigest()

    @property
    def norm(self) -> float | None:
        """See `NormMeter.norm`."""
        return self._norm.norm if self._norm else None

    def _sample(self, items: NDArray[Any]) -> None:
        wanted = positions(self._numel)
        if items.size < self._numel:
            first, self._done = self._done, self._done + items.size
            begin, end = wanted.searchsorted((first, self._done))
            wanted = wanted[begin:end] - first
        self.samples += items[wanted].tobytes()


_ITEMS = {8: "u1", 16: "u2", 32: "u4", 64: "u8"}
