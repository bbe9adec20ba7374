from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.floats import BLOCK
from modelgrove_hub.store.sketch import SAMPLES, Measured, TensorMeter, measure_run, positions

SCRATCH = np.empty(2 * BLOCK, np.uint32)


def measure(dtype: str, numel: int, *pieces: np.ndarray) -> Measured:
    meter = TensorMeter(dtype, numel, SCRATCH)
    for piece in pieces:
        meter.update(piece)
    return meter.result()


@settings(deadline=None)
@given(st.integers(0, 2**48))
def test_positions_are_distinct_rising_and_spread_over_the_tensor(numel: int):
    found = positions(numel)

    assert len(found) == min(SAMPLES, numel)
    assert (np.diff(found) > 0).all()
    starts = [number * numel // len(found) for number in range(len(found))]
    ends = [*starts[1:], numel]
    assert all(start <= place < end for start, place, end in zip(starts, found, ends, strict=False))


def test_positions_are_the_same_in_every_release():
    # Sketches in manifests of different age are compared: changing these numbers needs a new VERSION.
    assert positions(3).tolist() == [0, 1, 2]
    assert positions(10_000)[:4].tolist() == [115, 206, 357, 589]


@settings(deadline=None)
@given(st.sampled_from(["F32", "F16", "F8_E4M3", "I8"]), st.integers(0, 400), st.data())
def test_pieces_give_what_the_whole_gives(dtype: str, numel: int, data: st.DataObject):
    width = DTYPES[dtype].itemsize
    raw = np.random.default_rng(numel).integers(0, 60, numel * width, dtype=np.uint8)
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), max_size=3)))

    whole = measure(dtype, numel, raw)
    pieces = measure(dtype, numel, *np.split(raw, [cut * width for cut in cuts]))

    assert pieces.sha256 == whole.sha256 == hashlib.sha256(raw).hexdigest()
    assert pieces.samples == whole.samples
    # Both are sums in float32, taken in different order.
    assert pieces.norm == whole.norm is None or pieces.norm == pytest.approx(whole.norm, rel=1e-6)


@settings(deadline=None)
@given(st.sampled_from(["F32", "F16", "BF16", "F8_E5M2"]), st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_a_run_gives_what_each_tensor_gives_alone(dtype: str, counts: list[int]):
    width = DTYPES[dtype].itemsize
    raw = np.random.default_rng(sum(counts)).integers(0, 60, sum(counts) * width, dtype=np.uint8)
    ends = np.cumsum(counts)[:-1] * width

    together = list(measure_run(dtype, raw, counts, np.empty(raw.size, np.uint32)))

    for found, count, part in zip(together, counts, np.split(raw, ends), strict=True):
        alone = measure(dtype, count, part)
        assert found[::2] == alone[::2]
        assert found.norm == pytest.approx(alone.norm, rel=1e-6)  # float64 against float32
