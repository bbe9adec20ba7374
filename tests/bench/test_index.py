import numpy as np
import pytest


def test_the_true_first_are_those_of_sorting_all(bench):
    rng = np.random.default_rng(0)
    vectors, queries = (rng.normal(size=(count, 384)).astype(np.float32) for count in (bench.BATCH + 500, 3))
    chosen = np.arange(0, len(vectors), 2)
    expected = [set(chosen[np.argsort(-(vectors[chosen] @ query))[:10]].tolist()) for query in queries]
    assert bench.best_of(vectors, queries, chosen) == expected


@pytest.mark.parametrize("border", [100, 10_000])
def test_measuring_compares_the_index_with_all_vectors(bench, tmp_path, monkeypatch, border):
    monkeypatch.setattr("modelgrove_hub.search.vectors.FLAT_UP_TO", border)
    monkeypatch.setattr("modelgrove_hub.search.vectors.LOOKED_AT", 1000)
    rng = np.random.default_rng(0)
    centres = bench.directions(rng.normal(size=(20, 384)).astype(np.float32))
    vectors = np.concatenate(list(bench.like_models(centres, 2000)))
    row = bench.measure(vectors, centres[:5], tmp_path)
    assert row["kind"] == ("flat" if border > 2000 else "64 lists")
    # Search looks into half of the lists, and with a filter into all.
    assert row["few_recall10"] == 1
    assert row["recall200"] > 0.9
    assert row["file_mb"] > 2000 * 384 * 2 / 1e6
    assert list(tmp_path.iterdir()) == []
