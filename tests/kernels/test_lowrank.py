"""Low-rank algebra against dense float64 arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_kernels.lowrank import (
    LowRank,
    canonical,
    gram,
    inner,
    leading,
    merge,
    second_moment_gram,
    second_moment_inner,
)

# float32 QR and SVD: a few units in the last place (6e-8) times the summed rank's square root.
EXACT = 2e-6


def make(m, n, r, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, r, generator=generator, dtype=torch.float64)
    down = torch.randn(r, n, generator=generator, dtype=torch.float64)
    return LowRank(up.to(dtype), down.to(dtype))


def dense(update):
    return update.up.double() @ update.down.double()


def distance(found, wanted):
    return float((dense(found) - wanted).norm() / wanted.norm())


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_the_canonical_form_is_the_singular_value_decomposition(shape):
    m, n, r, seed = shape
    update = make(m, n, r, seed)
    form = canonical(update)
    wanted = torch.linalg.svdvals(dense(update))[: min(m, n, r)]
    assert form.S.double() == pytest.approx(wanted.numpy(), rel=1e-4, abs=float(wanted[0]) * EXACT)
    assert distance(form.factors(), dense(update)) < EXACT
    for side in (form.U, form.V):
        assert torch.allclose(side.T @ side, torch.eye(form.rank), atol=1e-5)


def test_the_canonical_form_does_not_depend_on_the_factors():
    update = make(60, 50, 6)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    same = LowRank((update.up.double() @ mixing).float(), (mixing.inverse() @ update.down.double()).float())
    one, other = canonical(update), canonical(same)
    # The gap between the singular values of a Gaussian is about a tenth, so vectors are good to ten roundings.
    assert torch.allclose(one.U, other.U, atol=1e-4)
    assert torch.allclose(one.V, other.V, atol=1e-4)
    assert (one.V.gather(0, one.V.abs().argmax(0, keepdim=True)) > 0).all()


def test_half_precision_factors_are_worked_on_in_float32_and_float64_stays():
    assert canonical(make(8, 8, 2, dtype=torch.bfloat16)).S.dtype == torch.float32
    assert canonical(make(8, 8, 2, dtype=torch.float64)).S.dtype == torch.float64


@given(st.integers(1, 48), st.integers(1, 48), st.lists(st.integers(1, 16), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_an_exact_merge_is_the_dense_weighted_sum(m, n, ranks, seed):
    updates = [make(m, n, rank, seed + place) for place, rank in enumerate(ranks)]
    weights = [0.3 + 0.4 * place for place in range(len(ranks))]
    wanted = sum(weight * dense(update) for weight, update in zip(weights, updates, strict=True))
    merged = merge(updates, weights)
    assert merged.error == 0.0 or merged.error < EXACT
    assert distance(merged.result.factors(), wanted) < 5e-6
    assert merged.result.rank <= min(m, n, sum(ranks))


def test_truncation_is_the_best_of_its_rank_and_says_what_it_lost():
    updates, weights = [make(64, 96, 8, seed) for seed in range(4)], [1.0, -0.5, 0.25, 2.0]
    wanted = sum(weight * dense(update) for weight, update in zip(weights, updates, strict=True))
    merged = merge(updates, weights, rank=10)
    tail = torch.linalg.svdvals(wanted)[10:].norm() / wanted.norm()
    assert merged.result.rank == 10
    assert merged.error == pytest.approx(float(tail), rel=1e-4)
    assert distance(merged.result.factors(), wanted) == pytest.approx(float(tail), rel=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_keeps_the_fewest_directions_that_hold_it(energy):
    updates = [make(40, 30, 8, seed) for seed in range(2)]
    wanted = torch.linalg.svdvals(sum(dense(update) for update in updates)).square()
    shares = wanted.cumsum(0) / wanted.sum()
    kept = merge(updates, [1.0, 1.0], energy=energy).result.rank
    assert shares[kept - 1] >= energy - 1e-6
    assert kept == 1 or shares[kept - 2] < energy


def test_copies_of_one_update_merge_to_its_own_rank():
    update = make(100, 80, 5)
    merged = merge([update] * 4, [0.25] * 4)
    assert merged.result.rank == 5
    assert distance(merged.result.factors(), dense(update)) < EXACT


def test_updates_that_cancel_leave_a_zero_of_rank_one():
    update = make(20, 30, 4)
    merged = merge([update, update], [1.0, -1.0])
    # Nothing is left but rounding of the parts.
    assert merged.result.norm < 1e-5 * float(dense(update).norm())
    assert merge([LowRank(update.up * 0, update.down)], [1.0]).result.rank == 1
    assert merge([LowRank(update.up[:, :0], update.down[:0])], [1.0]).result.factors().up.shape == (20, 1)


def test_the_order_of_the_updates_does_not_matter():
    updates = [make(30, 40, 4, seed) for seed in range(3)]
    one, other = merge(updates, [1.0, 2.0, 3.0], rank=6), merge(updates[::-1], [3.0, 2.0, 1.0], rank=6)
    assert torch.allclose(one.result.S, other.result.S, rtol=1e-5)
    assert distance(one.result.factors(), dense(other.result.factors())) < 1e-5


@given(shapes, st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_inner_products_are_those_of_the_dense_matrices(shape, rank):
    m, n, r, seed = shape
    a, b = make(m, n, r, seed, torch.float64), make(m, n, rank, seed + 1, torch.float64)
    x, y = dense(a), dense(b)
    # float64 throughout: only summation order differs.
    assert inner(a, b) == pytest.approx(float((x * y).sum()), rel=1e-9, abs=1e-9 * float(x.norm() * y.norm()))
    assert second_moment_inner(a, b) == pytest.approx(float(((x @ x.T) * (y @ y.T)).sum()), rel=1e-9)
    assert second_moment_inner(a.T, b.T) == pytest.approx(float(((x.T @ x) * (y.T @ y)).sum()), rel=1e-9)


def test_gram_matrices_hold_all_pairs():
    updates = [make(24, 18, rank, rank, torch.float64) for rank in (1, 3, 7)]
    others = [make(24, 18, 2, 50, torch.float64)]
    whole, cross = gram(updates), second_moment_gram(updates, others)
    for i, a in enumerate(updates):
        assert float(cross[i, 0]) == pytest.approx(second_moment_inner(a, others[0]), rel=1e-12)
        for j, b in enumerate(updates):
            assert float(whole[i, j]) == pytest.approx(inner(a, b), rel=1e-12, abs=1e-12)
    assert torch.linalg.eigvalsh(second_moment_gram(updates)).min() > -1e-9


@pytest.mark.parametrize(("shape", "rank"), [((9, 5), 64), ((5, 9), 3), ((130, 300), 8), ((400, 300), 8)])
def test_leading_directions_are_those_of_the_singular_value_decomposition(shape, rank):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(shape, generator=generator) @ torch.diag(0.7 ** torch.arange(shape[1]))
    found, expected = leading(X, rank), torch.linalg.svdvals(X.double())[:rank]
    # The matrices that are not decomposed whole lose 0.7¹⁸ of the largest value, and its fifth power after two passes.
    torch.testing.assert_close(found.S.double(), expected, atol=1e-5 * float(expected[0]), rtol=1e-4)
    torch.testing.assert_close(X @ found.V, found.U * found.S, atol=1e-3 * float(expected[0]), rtol=0)
    assert found.T.U is found.V
    again = leading(X, rank)
    assert torch.equal(found.U, again.U)
    assert torch.equal(leading(X.half(), rank).S, leading(X.half().float(), rank).S)


def test_leading_directions_of_what_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        leading(torch.full((40, 300), torch.inf), 2)


def test_factors_that_make_no_update_are_refused():
    with pytest.raises(ValueError, match="do not make an update"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))


def test_a_merge_refuses_other_shapes_missing_weights_and_nan():
    with pytest.raises(ValueError, match="different shapes"):
        merge([make(4, 4, 1), make(4, 5, 1)], [1.0, 1.0])
    with pytest.raises(ValueError, match="1 updates and 2 weights"):
        merge([make(4, 4, 1)], [1.0, 1.0])
    with pytest.raises(ValueError, match="NaN"):
        merge([LowRank(torch.full((3, 1), torch.nan), torch.ones(1, 3))], [1.0])
