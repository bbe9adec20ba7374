"""Interference measures against dense float64 arithmetic, and what the repairs promise."""

import math

import pytest
import torch

from modelgrove_kernels.lowrank import LowRank, canonical, merge
from modelgrove_kernels.subspace import (
    directions,
    echoes,
    effective_rank,
    entropy_rank,
    noise_floor,
    orthogonalise,
    project_apart,
    project_in_turn,
    relations,
    rounding_floor,
    share_inputs,
)


def make(m, n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))


def dense(update):
    return update.up.double() @ update.down.double()


UPDATES = [make(48, 64, rank, rank) for rank in (3, 5, 8)]
FORMS = [canonical(update) for update in UPDATES]


def related(m, n, r, shared, seed):
    """Two updates whose inputs have `shared` directions in common."""
    one, other = make(m, n, r, seed), make(m, n, r, seed + 1)
    return [one, LowRank(other.up, torch.cat([one.down[:shared], other.down[shared:]]))]


def test_relations_are_those_of_the_dense_matrices():
    found = relations(FORMS)
    for i, (a, x) in enumerate(zip(FORMS, map(dense, UPDATES), strict=True)):
        for j, (b, y) in enumerate(zip(FORMS, map(dense, UPDATES), strict=True)):
            # float32 against float64: some roundings of the largest value, which is the norms' product.
            room = 1e-5 * float(x.norm() * y.norm())
            smaller = min(a.rank, b.rank)
            assert float(found.inner[i, j]) == pytest.approx(float((x * y).sum()), abs=room)
            assert float(found.echo[i, j]) == pytest.approx(float((y @ a.V.double() * a.S).norm()), abs=room)
            overlap = float((a.V.T @ b.V).square().sum()) / smaller
            assert float(found.input_overlap[i, j]) == pytest.approx(overlap, abs=1e-5)
            overlap = float((a.U.T @ b.U).square().sum()) / smaller
            assert float(found.output_overlap[i, j]) == pytest.approx(overlap, abs=1e-5)


def test_an_update_overlaps_itself_entirely_and_a_disjoint_one_not_at_all():
    eye = torch.eye(16)
    forms = [canonical(LowRank(torch.ones(4, 2) + torch.eye(4, 2), eye[place : place + 2])) for place in (0, 2)]
    found = relations(forms)
    assert torch.allclose(found.input_overlap, torch.eye(2), atol=1e-6)
    assert float(found.echo[0, 1]) == pytest.approx(0, abs=1e-6)


def test_random_subspaces_overlap_by_the_chance_level():
    overlaps = [
        relations([canonical(make(64, 256, 16, 2 * s)), canonical(make(64, 256, 8, 2 * s + 1))]) for s in range(20)
    ]
    mean = sum(float(found.input_overlap[0, 1]) for found in overlaps) / len(overlaps)
    # Expected max(16, 8)/256; one pair deviates by about a tenth, the mean of twenty by a fortieth.
    assert mean == pytest.approx(16 / 256, rel=0.1)


def test_an_update_of_nothing_relates_to_nothing():
    nothing = canonical(LowRank(torch.zeros(48, 2), torch.zeros(2, 64))).above(0.0)
    found = relations([nothing, FORMS[0]])
    assert float(found.echo[0, 1]) == float(found.input_overlap[0, 1]) == 0.0


def test_projection_takes_away_exactly_what_others_read():
    updates = related(40, 60, 6, shared=2, seed=3)
    forms = [canonical(update) for update in updates]
    apart = project_apart(forms)
    for i, (after, before) in enumerate(zip(apart, updates, strict=True)):
        others = torch.linalg.svd(dense(updates[1 - i]), full_matrices=False)[2][:6]
        wanted = dense(before) - dense(before) @ others.T @ others
        # float32 against float64, and the shared directions are recovered to 100 eps.
        assert float((dense(after) - wanted).norm() / wanted.norm()) < 1e-4
        assert float((dense(after) @ others.T).norm() / dense(before).norm()) < 1e-5
    answers = echoes(forms, [canonical(one) for one in apart])
    assert float(answers[0, 1]) < 1e-5 * float(relations(forms).echo[0, 1])


def test_projection_of_a_single_or_a_disjoint_update_changes_nothing():
    [alone] = project_apart(FORMS[:1])
    assert torch.allclose(alone.up @ alone.down, UPDATES[0].up @ UPDATES[0].down, atol=1e-4)


def test_projection_of_a_copy_leaves_nothing():
    twins = project_apart([FORMS[2], FORMS[2]])
    assert all(float((one.up @ one.down).norm()) < 1e-5 * FORMS[2].norm for one in twins)


def test_loewdin_makes_all_directions_orthonormal_and_keeps_the_singular_values():
    after = [canonical(one) for one in orthogonalise(FORMS)]
    found = relations(after)
    assert torch.allclose(found.input_overlap, torch.eye(3), atol=1e-5)
    assert torch.allclose(found.output_overlap, torch.eye(3), atol=1e-5)
    for one, before in zip(after, FORMS, strict=True):
        assert torch.allclose(one.S, before.S, rtol=1e-4)


def test_loewdin_is_the_nearest_orthonormal_stack():
    stacked = torch.cat([form.V for form in FORMS], dim=1).double()
    u, _, vt = torch.linalg.svd(stacked, full_matrices=False)
    wanted = (u @ vt).split([form.rank for form in FORMS], dim=1)
    for one, form, V in zip(orthogonalise(FORMS), FORMS, wanted, strict=True):
        assert torch.allclose(one.down.double(), V.T, atol=1e-5)
        assert one.up.shape == form.U.shape


def test_loewdin_averages_copies_instead_of_doubling_them():
    twins = orthogonalise([FORMS[1], FORMS[1]])
    total = merge(twins, [1.0, 1.0]).result
    # Each twin keeps u/√2 and v/√2, so their sum is the one update again.
    assert torch.allclose(total.S, FORMS[1].S, rtol=1e-4)


def test_loewdin_keeps_the_strongest_directions_where_there_is_no_room():
    crowd = [canonical(make(10, 32, 6, seed)) for seed in range(3)]
    after = orthogonalise(crowd)
    assert [one.rank for one in after] == [3, 3, 3]
    assert torch.allclose(canonical(after[0]).S, crowd[0].S[:3], rtol=1e-4)


def test_effective_ranks():
    values = torch.tensor([4.0, 2.0, 1.0, 0.0])
    assert effective_rank(values, 1.5) == 2
    assert entropy_rank(torch.ones(8)) == pytest.approx(8)
    assert entropy_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert entropy_rank(torch.zeros(3)) == 0


def test_rounding_to_half_precision_stays_below_its_floor():
    update = canonical(make(64, 64, 4, 9)).factors()
    rounded = LowRank(update.up.half(), update.down.half())
    noise = torch.linalg.matrix_norm(dense(rounded) - dense(update), 2)
    floor = rounding_floor(float(dense(update).norm()), torch.float16)
    assert floor / 100 < float(noise) < floor


def test_the_noise_floor_is_the_edge_of_a_random_matrix():
    noise = torch.randn(200, 400, generator=torch.Generator().manual_seed(0))
    # The largest singular value is within a few percent of the Marchenko–Pastur edge at this size.
    assert math.isclose(float(torch.linalg.matrix_norm(noise, 2)), noise_floor(1.0, (200, 400)), rel_tol=0.05)


def test_directions_of_a_formed_matrix_are_those_of_its_factors():
    for update, form in zip(UPDATES, FORMS, strict=True):
        found = directions(update.up @ update.down)
        assert found.rank == form.rank
        assert torch.allclose(found.S, form.S, rtol=1e-4)
        assert directions(update.up @ update.down, 2).rank == 2
    assert directions(torch.zeros(4, 6)).rank == 0


def test_in_turn_each_gives_up_what_earlier_ones_read():
    after = [dense(one) for one in project_in_turn(FORMS)]
    assert float((after[0] - dense(UPDATES[0])).norm()) < 1e-5 * FORMS[0].norm
    seen = torch.cat([form.V for form in FORMS[:2]], dim=1).double()
    basis = torch.linalg.qr(seen)[0]
    wanted = dense(UPDATES[2]) - dense(UPDATES[2]) @ basis @ basis.T
    # float32 against float64.
    assert float((after[2] - wanted).norm() / wanted.norm()) < 1e-4


def test_shares_of_inputs_add_up_to_one_and_let_nothing_grow():
    near = canonical(LowRank(UPDATES[2].up, UPDATES[2].down + 0.05 * UPDATES[1].down.repeat(2, 1)[:8]))
    forms = [*FORMS, near]
    energies = [dense(form.factors()).T @ dense(form.factors()) for form in forms]
    values, vectors = torch.linalg.eigh(sum(energies))
    read = values > 1e-10 * values[-1]
    root = (vectors[:, read] / values[read].sqrt()) @ vectors[:, read].T
    shares = [root @ energy @ root for energy in energies]
    assert torch.allclose(sum(shares), vectors[:, read] @ vectors[:, read].T, atol=1e-6)
    for form, share, after in zip(forms, shares, share_inputs(forms), strict=True):
        wanted = dense(form.factors()) @ share
        # float32 against float64, through directions that two updates nearly share.
        assert float((dense(after) - wanted).norm() / wanted.norm()) < 1e-3
        assert float(dense(after).norm()) < form.norm * (1 + 1e-5)


def test_shares_of_nothing_are_nothing():
    nothing = canonical(LowRank(torch.zeros(48, 2), torch.zeros(2, 64))).above(0.0)
    [one, other] = share_inputs([nothing, FORMS[0]])
    assert one.rank == 0
    assert float((dense(other) - dense(UPDATES[0])).norm()) < 1e-5 * FORMS[0].norm
    assert [part.rank for part in share_inputs([nothing, nothing])] == [0, 0]
