"""What one tensor is known by: its hash, its norm, and a few of its values at public positions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.floats import NormMeter, norms_of

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


class Measured(NamedTuple):
    """What was found of one tensor. No norm and no samples if its type is no float."""

    sha256: str
    norm: float | None
    samples: bytes
    """The stored bytes of the values at `positions`."""


class TensorMeter:
    """Measures one tensor whose bytes come in pieces, each a whole number of elements.

    `scratch` is lent to `NormMeter`.
    """

    def __init__(self, dtype: str, numel: int, scratch: NDArray[np.uint32]) -> None:
        kind = DTYPES[dtype]
        self._hash = hashlib.sha256()
        self._norm = NormMeter(kind, scratch) if kind.is_float else None
        self._item = f"u{kind.itemsize}"
        self._numel = numel
        self._done = 0
        self._samples = b""

    def update(self, raw: NDArray[np.uint8]) -> None:
        """Add the next bytes, a flat uint8 array."""
        self._hash.update(raw)
        if self._norm:
            self._norm.update(raw)
            self._sample(raw.view(self._item))

    def result(self) -> Measured:
        """What was found, once all pieces are in."""
        return Measured(self._hash.hexdigest(), self._norm.norm if self._norm else None, self._samples)

    def _sample(self, items: NDArray[Any]) -> None:
        first, self._done = self._done, self._done + items.size
        wanted = positions(self._numel)
        begin, end = wanted.searchsorted((first, self._done))
        self._samples += items[wanted[begin:end] - first].tobytes()


def measure_run(
    dtype: str, raw: NDArray[np.uint8], counts: Sequence[int], scratch: NDArray[np.uint32]
) -> Iterator[Measured]:
    """Measure many small tensors of one float type that lie one after another: a tenth of the time.

    Args:
        dtype: their type.
        raw: their bytes.
        counts: elements of each, none of them zero.
        scratch: at least as many items as `raw` has elements.
    """
    kind = DTYPES[dtype]
    norms = norms_of(kind, raw, counts, scratch)
    starts = accumulate(counts, initial=0)
    wanted = np.concatenate([positions(count) + start for start, count in zip(starts, counts, strict=False)])
    samples = raw.view(f"u{kind.itemsize}")[wanted].tobytes()
    place = sampled = 0
    for count, norm in zip(counts, norms, strict=True):
        end, last = place + count * kind.itemsize, sampled + min(count, SAMPLES) * kind.itemsize
        yield Measured(hashlib.sha256(raw[place:end]).hexdigest(), norm, samples[sampled:last])
        place, sampled = end, last
