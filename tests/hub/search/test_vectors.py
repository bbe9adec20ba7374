import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.search import vectors as module
from modelgrove_hub.search.vectors import FLAT_UP_TO, VectorIndex, lists_for

WIDTH = 8
QUERY = np.arange(WIDTH, dtype=np.float32)
KINDS = [0, 4]
"""Inverted lists of the indexes tested: a flat one, and one of the kind that is used for many vectors."""


def draw(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def empty(lists):
    return VectorIndex.empty(WIDTH, lists, draw(40, seed=0))


def tolerance(lists, vectors):
    """float32 sums differ in the last digits; float16 keeps eleven bits of each number."""
    return float((2**-11 if lists else 1e-6) * 2 * np.abs(QUERY).sum() * max(np.abs(vectors).max(), 1))


def assert_best(found, held, limit, lists):
    """`found` is what comparing all of `held` gives; models as good as each other may change places."""
    scores = sorted((float(vector @ QUERY) for vector in held.values()), reverse=True)[:limit]
    near = tolerance(lists, np.array(list(held.values()))) if held else 0
    assert len({one for one, _ in found}) == len(found) == len(scores)
    for (one, score), best in zip(found, scores, strict=True):
        assert score == pytest.approx(float(held[one] @ QUERY), abs=near)
        assert score == pytest.approx(best, abs=near)


STEPS = st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 60), min_size=1, max_size=20)), max_size=8)


@pytest.mark.parametrize("lists", KINDS)
@settings(max_examples=60, deadline=None)
@given(STEPS, st.sets(st.integers(0, 70)), st.integers(1, 80))
def test_after_any_steps_an_index_finds_what_comparing_all_finds(lists, steps, allowed, limit):
    index, held = empty(lists), {}
    for number, (adds, chosen) in enumerate(steps):
        ids = np.array(sorted(chosen), np.int64)
        if adds:
            index.replace(ids, draw(len(ids), seed=number))
            held |= dict(zip(ids.tolist(), draw(len(ids), seed=number), strict=True))
        else:
            index.remove(ids)
            held = {one: vector for one, vector in held.items() if one not in chosen}
    assert index.ids.tolist() == sorted(held)
    assert len(index) == len(held)
    assert_best(index.search(QUERY, limit), held, limit, lists)
    # Only what is held can be found, whatever is allowed.
    passing = {one: vector for one, vector in held.items() if one in allowed}
    assert_best(index.search(QUERY, limit, sorted(allowed))[: len(passing)], passing, limit, lists)


@pytest.mark.parametrize("lists", KINDS)
def test_allowed_ids_are_found_in_the_farthest_list(lists, monkeypatch):
    monkeypatch.setattr(module, "LOOKED_AT", 1)
    vectors = draw(300)
    index = empty(lists)
    index.replace(np.arange(300), vectors)
    order = np.argsort(vectors @ QUERY)
    worst = {int(one): vectors[one] for one in order[:5]}
    assert_best(index.search(QUERY, 3, list(worst)), worst, 3, lists)
    best = {int(one): vectors[one] for one in order[-1:]}
    assert_best(index.search(QUERY, 1), best, 1, lists)


@pytest.mark.parametrize("lists", KINDS)
def test_a_copy_changes_alone_and_bytes_give_the_same_index(lists):
    index = empty(lists)
    index.replace(np.arange(30), draw(30))
    before = index.search(QUERY, 10)
    copy = index.copy()
    copy.remove(np.array([before[0][0]]))
    assert index.search(QUERY, 10) == before
    assert copy.search(QUERY, 10)[:9] == before[1:]
    file = io.BytesIO()
    index.write(file.write)
    read = VectorIndex.read(io.BytesIO(file.getvalue()).read)
    assert read.search(QUERY, 10) == before
    assert read.lists == lists
    for cut in (0, 3, 100, len(file.getvalue()) - 1):
        with pytest.raises(ValueError, match=r"."):
            VectorIndex.read(io.BytesIO(file.getvalue()[:cut]).read)


def test_many_vectors_get_lists_and_keep_them_until_they_are_few_again():
    assert lists_for(FLAT_UP_TO) == 0
    assert lists_for(FLAT_UP_TO + 1) == 512
    assert lists_for(1_000_000) == 2048
    assert lists_for(FLAT_UP_TO // 2 + 1, 512) == 512
    assert lists_for(FLAT_UP_TO // 2, 512) == 0
    assert lists_for(FLAT_UP_TO, 0) == 0


@given(st.integers(0, 10**8), st.floats(2 / 3, 3 / 2))
def test_an_index_is_not_rebuilt_for_a_third_more_or_less(count, growth):
    now = lists_for(count)
    assert lists_for(count, now) == now
    later = lists_for(int(count * growth), now)
    assert later in (now, lists_for(int(count * growth))) if now == 0 else later == now
