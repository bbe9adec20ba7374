from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.floats import BLOCK, NormMeter, decode, norms_of

SMALL = [name for name, dtype in DTYPES.items() if dtype.small]
FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_float]


def every_code(dtype: str) -> np.ndarray:
    return np.arange(2 ** DTYPES[dtype].bits, dtype=f"<u{DTYPES[dtype].itemsize}").view(np.uint8)


def as_torch(dtype: str, raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(raw.copy()).view(getattr(torch, DTYPES[dtype].torch))


def meter(dtype: str, *pieces: np.ndarray) -> float | None:
    norm = NormMeter(DTYPES[dtype], np.empty(2 * BLOCK, np.uint32))
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in pieces:
            norm.update(piece)
    return norm.norm


def run(dtype: str, raw: np.ndarray, counts: list[int]) -> list[float | None]:
    with np.errstate(over="ignore", invalid="ignore"):
        return norms_of(DTYPES[dtype], raw, counts, np.empty(max(raw.size, 1), np.uint32))


def random_bytes(dtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Normal numbers of about 0.02, as weights are, in the stored form."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.02
    return values.to(getattr(torch, DTYPES[dtype].torch)).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", [*SMALL, "F8_E8M0"])
def test_every_code_of_a_small_float_means_what_torch_says(dtype: str):
    raw = every_code(dtype)

    expected = as_torch(dtype, raw).float().numpy()

    np.testing.assert_array_equal(decode(dtype, raw), expected)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(decode(dtype, raw))[finite], np.signbit(expected)[finite])


@pytest.mark.parametrize("dtype", ["F32", "F64", "I8", "U16", "I64", "C64", "BOOL"])
def test_other_types_stay_what_they_are(dtype: str):
    raw = np.ones(16, np.uint8)

    np.testing.assert_array_equal(decode(dtype, raw), as_torch(dtype, raw).numpy())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_norm_is_that_of_float64(dtype: str):
    raw = random_bytes(dtype, 3 * BLOCK + 17)
    cut = BLOCK * DTYPES[dtype].itemsize // 2

    expected = float(as_torch(dtype, raw).double().norm())

    # Sums of 2^16 squares in float32, pairwise: about 16 roundings of 6e-8.
    assert meter(dtype, raw[:cut], raw[cut:]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_tensors_at_once_have_the_same_norms(dtype: str):
    counts = [1, 5, 1000, 64, 1, 8]
    raw = random_bytes(dtype, sum(counts))
    parts = as_torch(dtype, raw).double().split(counts)

    expected = [float(part.norm()) for part in parts]

    assert run(dtype, raw, counts) == pytest.approx(expected, rel=1e-8)  # squares of float64


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("together", [False, True])
def test_a_value_that_is_not_finite_leaves_no_norm(dtype: str, together: bool):
    width = DTYPES[dtype].itemsize
    codes = every_code(dtype).reshape(-1, width)
    values = as_torch(dtype, codes.reshape(-1)).float()
    for index in [*range(0, len(codes), max(1, len(codes) // 512)), -1]:
        raw = np.concatenate([random_bytes(dtype, 3), codes[index]])
        norm = run(dtype, raw, [1, 3])[1] if together else meter(dtype, raw)

        assert (norm is None) == (not values[index].isfinite()), f"code {index}"


@pytest.mark.parametrize(("dtype", "bad"), [("F32", np.nan), ("F32", np.inf), ("F64", np.nan), ("F64", -np.inf)])
def test_one_bad_tensor_does_not_spoil_its_neighbours(dtype: str, bad: float):
    raw = np.array([3.0, 4.0, bad, 1.0, 0.0, 0.0, 2.0], DTYPES[dtype].numpy).view(np.uint8)

    assert run(dtype, raw, [2, 2, 2, 1]) == [5.0, None, 0.0, 2.0]
    assert meter(dtype, raw) is None


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("F32", [3e30, 4e30]),
        ("F32", [3e-40, 4e-40]),
        ("F64", [3e200, 4e200]),
        ("F64", [3e-200, 4e-200]),
        ("BF16", [3e30, 4e30]),
        ("BF16", [3e-30, 4e-30]),
    ],
)
def test_squares_that_leave_the_range_do_not_ruin_a_norm(dtype: str, values: list[float]):
    tensor = torch.tensor(values, dtype=torch.float64).to(getattr(torch, DTYPES[dtype].torch))
    raw = tensor.view(torch.uint8).numpy()

    expected = math.hypot(*tensor.tolist())

    assert meter(dtype, raw) == pytest.approx(expected, rel=1e-6)
    assert meter(dtype, *np.split(raw, 2)) == pytest.approx(expected, rel=1e-6)
    assert run(dtype, raw, [2]) == pytest.approx([expected], rel=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.data())
def test_any_floats_in_any_pieces_have_the_norm_of_the_whole(values: list[float], data: st.DataObject):
    array = np.array(values, np.float32)
    cut = data.draw(st.integers(0, len(values)))

    expected = math.hypot(*array.tolist())

    for norm in (
        meter("F32", array[:cut].view(np.uint8), array[cut:].view(np.uint8)),
        *run("F32", array.view(np.uint8), [array.size]),
    ):
        assert (norm is None) == (not np.isfinite(array).all())
        # The smallest squares of a block may be lost beside large ones: one part in 10^6 of the norm.
        assert norm is None or norm == pytest.approx(expected, rel=1e-6)
