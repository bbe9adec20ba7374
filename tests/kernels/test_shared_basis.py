import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_kernels.shared_basis import Found, basis, columns, find_columns, fit

WIDTH, SEED = 96, 11
WRITTEN = [-0.2213534713, -0.2907979190, 0.9042860270, -0.2206942290]


def test_the_basis_is_orthogonal_and_depends_on_width_and_seed_alone():
    whole = basis(WIDTH, SEED, WIDTH)
    assert whole.dtype == torch.float32
    # Rounding to float32: entries of size 0.1, 96 of them in each product.
    torch.testing.assert_close(whole.T @ whole, torch.eye(WIDTH), rtol=0, atol=1e-6)
    assert not torch.allclose(whole, basis(WIDTH, SEED + 1, WIDTH), atol=0.1)


def test_it_is_the_orthogonal_factor_of_the_documented_gaussian():
    # Gram-Schmidt, column by column: an independent way to the factor whose triangle has a positive diagonal.
    gaussian = np.random.RandomState([SEED, WIDTH]).standard_normal((WIDTH, WIDTH)).T
    wanted = np.zeros((WIDTH, WIDTH))
    for j in range(WIDTH):
        rest = gaussian[:, j]
        for _ in range(2):  # twice is enough for orthogonality to rounding
            rest = rest - wanted[:, :j] @ (wanted[:, :j].T @ rest)
        wanted[:, j] = rest / np.linalg.norm(rest)
    np.testing.assert_allclose(basis(WIDTH, SEED, WIDTH).numpy(), wanted, rtol=0, atol=1e-6)


def test_values_are_those_of_every_other_machine():
    # Written down once: a changed stream of random numbers would make every file's columns foreign.
    torch.testing.assert_close(columns(4, 7, 0, 2)[:, 1], torch.tensor(WRITTEN), rtol=0, atol=1e-6)


@given(start=st.integers(0, 80), count=st.integers(1, 16))
def test_a_range_is_the_same_however_much_of_the_basis_is_computed(start, count):
    part = columns(WIDTH, SEED, start, count)
    torch.testing.assert_close(part, basis(WIDTH, SEED, WIDTH)[:, start : start + count], rtol=0, atol=1e-6)


@given(st.integers(2, 7), st.integers(0, 3), st.integers(1, 3))
def test_disjoint_ranges_never_read_each_other(width_in_tens, first, rank):
    a, b = (columns(10 * width_in_tens, 5, start, rank) for start in (first, first + rank))
    assert (a.T @ b).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("width", "seed", "count"), [(8, 0, 9), (8, 0, 0), (8, -1, 2), (8, 2**32, 2), (2**20, 0, 2**10)]
)
def test_a_basis_that_cannot_be_is_refused(width, seed, count):
    with pytest.raises(ValueError, match=f"{count}"):
        basis(width, seed, count)


def test_a_range_before_the_first_column_is_refused():
    with pytest.raises(ValueError, match="starts at 0"):
        columns(8, 0, -1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("scale", [1.0, -0.03, 250.0])
def test_scaled_columns_fit_but_for_rounding(dtype, tolerance, scale):
    own = columns(WIDTH, SEED, 8, 4)
    # A float's rounding is at most half a unit in its last place: 2^-24, 2^-11 and 2^-8 of the value halved again.
    found = fit((scale * own.T).to(dtype), own)
    assert found.rows < tolerance
    assert found.span < tolerance


def test_rotated_rows_read_the_same_columns():
    own = columns(WIDTH, SEED, 8, 4)
    found = fit(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) @ own.T, own)
    assert found.rows > 0.3
    assert found.span < 1e-6


def test_what_was_trained_away_is_measured_relative_to_the_factor():
    own, other = columns(WIDTH, SEED, 8, 4), columns(WIDTH, SEED, 40, 4)
    found = fit(3 * own.T + 0.03 * other.T, own)
    assert found == pytest.approx((0.01, 0.01), rel=1e-3)  # 0.03 / √(3² + 0.03²)
    assert fit(other.T, own) == pytest.approx((1.0, 1.0))
    assert fit(torch.zeros(4, WIDTH), own) == (0.0, 0.0)


def test_fewer_rows_may_be_the_first_columns_and_more_rows_are_none():
    own = columns(WIDTH, SEED, 8, 4)
    assert fit(own.T[:2], own).rows < 1e-6
    more = fit(columns(WIDTH, SEED, 8, 6).T, own)
    assert more.rows == 1.0
    assert more.span == pytest.approx((2 / 6) ** 0.5, rel=1e-4)


def test_columns_of_an_unknown_factor_are_found():
    whole = basis(WIDTH, SEED, WIDTH)
    mixed = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) @ whole.T[[5, 6, 70, 90]]
    found = find_columns(mixed, whole, 1e-3)
    assert found.columns == (5, 6, 70, 90)
    assert found.outside < 1e-3  # the square root of float32's rounding of squares
    half = find_columns(mixed, whole[:, :48], 1e-3)
    assert half.columns == (5, 6)
    assert 0.1 < half.outside < 1
    assert find_columns(torch.zeros(4, WIDTH), whole, 1e-3) == Found((), 0.0)


def test_a_factor_that_knows_nothing_of_the_basis_is_mostly_outside_of_its_best_columns():
    stranger = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    # The four best of 96 columns hold little more than 4 / 96 of the squared norm.
    assert find_columns(stranger, basis(WIDTH, SEED, WIDTH), 1e-3).outside > 0.8
