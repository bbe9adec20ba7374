"""Parents, merges and their weights, from models whose ancestry is known because it was made here."""

import numpy as np
import pytest

from modelgrove_analyzers.heritage.ancestry import (
    KEPT,
    Space,
    find_origins,
    kept_share,
    probability,
    relation,
    space_of,
)

DIMENSIONS = 4000


@pytest.fixture
def dice():
    return np.random.default_rng(0)


def made_space(*points):
    points = np.stack(points)
    return Space(points, np.square(points).sum(1))


def parents(origins):
    return [origin.parent for origin in origins]


@pytest.fixture
def family(dice):
    """A base, a chain of two on it, and three siblings that learned alike: nearer to each other than to the base."""

    def step(size=1.0):
        return size * dice.normal(size=DIMENSIONS)

    base, shared = step(10), step()
    child = base + step()
    fan = [base + shared + step(0.7) for _ in range(3)]
    return made_space(base, child, child + step(0.5), *fan)


def test_chains_and_fans_are_told_apart_where_the_nearest_is_wrong(family):
    nearest = [int(np.argmin(family.from_one(n)[:n])) for n in range(1, 6)]

    origins = find_origins(family, range(6))

    assert parents(origins) == [None, 0, 1, 0, 0, 0]
    assert nearest[3:] != [0, 0]  # siblings are nearer
    assert [relation(origins, 2, other) for other in (1, 0, 3)] == ["parent", "ancestor", "same family"]
    assert (relation(origins, 3, 4), relation(origins, 0, 5)) == ("sibling", "child")


def test_without_times_the_distance_from_the_root_gives_the_order(family):
    shuffled = np.array([3, 2, 5, 0, 1, 4])
    origins = find_origins(Space(family.points[shuffled], family.energy[shuffled]))

    assert [None if p is None else int(shuffled[p]) for p in parents(origins)] == [0, 1, 0, None, 0, 0]


def test_simultaneous_models_are_ordered_by_distance_and_others_by_time(family):
    # Registered together, in an order that says nothing; the last came a day later.
    assert parents(find_origins(family, [0, 5, 3, 4, 1, 86400], slack=3600)) == [None, 0, 1, 0, 0, 0]


def test_a_child_is_no_parent_of_what_was_there_before(family):
    origins = find_origins(family, [0, 2, 1, 3, 4, 5])

    assert origins[2].parent == 0  # its true parent is said to be later
    assert origins[1].parent in (0, 2)


@pytest.mark.parametrize("times", [range(7), None])
def test_merges_are_found_with_their_weights(family, times):
    mix = 0.3 * family.points[2] + 0.7 * family.points[4]
    space = made_space(*family.points, mix.astype(np.float32).astype(float))

    merge = find_origins(space, times)[6]

    # float32 keeps seven digits, and the members are a tenth apart.
    assert dict(merge.members) == pytest.approx({4: 0.7, 2: 0.3}, abs=1e-5)
    assert merge.gain > 0.999
    assert merge.parent == 4


def test_a_merge_is_told_by_models_and_not_by_another_merge_of_them(family):
    one = 0.5 * family.points[2] + 0.5 * family.points[4]
    other = 0.4 * family.points[2] + 0.3 * family.points[4] + 0.3 * family.points[5]
    origins = find_origins(made_space(*family.points, one, other), range(8))

    assert dict(origins[7].members) == pytest.approx({2: 0.4, 4: 0.3, 5: 0.3}, abs=1e-6)


def test_a_sibling_between_others_is_no_merge(family):
    assert all(not origin.members for origin in find_origins(family, range(6)))


def test_what_is_kept_is_a_projection(family):
    assert kept_share(family, 1, 1, 0) == pytest.approx(1)
    assert kept_share(family, 2, 1, 0) == pytest.approx(1, abs=0.05)  # independent steps: ± 1 / √4000 each
    assert abs(kept_share(family, 3, 1, 0)) < 0.05


def test_probabilities_rise_with_the_evidence():
    sure, border = probability(1.5, 0.2, timed=True), probability(KEPT, KEPT, timed=True)

    assert border < 0.5 < sure < 1
    assert probability(1.5, 0.2, timed=False) < sure


def test_points_come_from_sketches_and_estimate_distances_of_all_weights(network, facts_from):
    noise = network(9)
    other = {name: tensor + 0.1 * noise[name] for name, tensor in network().items()}
    renamed = {f"model.{name}": tensor for name, tensor in network().items()}
    whole = sum(
        float((other[name] - tensor).square().sum()) for name, tensor in network().items() if "norm" not in name
    )

    space, kept = space_of(
        [
            facts_from("base", 1, network()),
            facts_from("other", 2, other),
            facts_from("renamed", 3, renamed),
            facts_from("foreign", 4, {"only.weight": network()["conv_in.weight"]}),
        ]
    )

    assert kept == [0, 1, 2]
    # 64 samples of each of 13 tensors: the deviation of their mean square is √(2 / 832) = 5 %.
    assert space.from_one(0)[1] == pytest.approx(whole, rel=0.2)
    assert space.from_one(0)[2] == 0
