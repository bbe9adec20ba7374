"""What bench/heritage.py counts, on models whose ancestry is plain."""

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def family(bench, tmp_path):
    """A base, a child, the child's child, and a merge of base and grandchild."""
    generator = torch.Generator().manual_seed(0)

    def step(size):
        return {name: size * torch.randn(40, 40, generator=generator) for name in ("a", "b", "c")}

    def add(one, other):
        return {name: one[name] + other[name] for name in one}

    base = step(1.0)
    child = add(base, step(0.2))
    last = add(child, step(0.1))
    mix = {name: 0.4 * base[name] + 0.6 * last[name] for name in base}
    truth = {
        "base": (base, "base", (), ()), "child": (child, "fine-tune", ("base",), ()),
        "last": (last, "fine-tune", ("child",), ()), "mix": (mix, "merge", ("last", "base"), (0.6, 0.4)),
    }  # fmt: skip
    made = []
    for number, (name, (weights, *facts)) in enumerate(truth.items(), 1):
        file = tmp_path / f"{name}.safetensors"
        save_file(weights, file)
        made.append(bench.Known(bench.on_disk(file, name, number), *facts))
    return made


def test_the_plugin_finds_all(bench, family, tmp_path):
    answers = bench.METHODS["tree, root"](family, tmp_path / "temp")
    counted = bench.count([family], [answers])

    assert (counted["edges"], counted["of"], counted["roots"]) == (1.0, 2, 1)
    assert (counted["merges"], counted["merges_called"], counted["false_merges"]) == (1, 1, 0)
    assert counted["largest_weight_error"] < 1e-4  # rounding of float32


def test_what_is_nearest_is_counted_as_it_is(bench, family, tmp_path):
    nearest = bench.METHODS["nearest earlier"](family, tmp_path)

    assert [row["parents"] for row in nearest[:3]] == [[], ["base"], ["child"]]
    assert bench.count([family], [nearest])["edges"] == 1.0


def test_mother_gives_one_root_and_a_parent_to_each_other(bench, family, tmp_path):
    for name in ("MoTHer", "MoTHer, turned"):
        parents = [row["parents"] for row in bench.METHODS[name](family[:3], tmp_path)]
        assert sorted(map(len, parents)) == [0, 1, 1]
        # The ends of the chain are farther from each other than from the middle, whichever way it is turned.
        assert parents[0] != ["last"]
        assert parents[2] != ["base"]


def test_pairs_of_one_tree_and_of_two_are_told_apart(bench, tmp_path):
    trees = bench.classifiers(tmp_path / "trees", 2, 0, bench.Size(fine_tunes=3, letters=60, base_steps=2))
    assert {known.made_by for known in trees[0]} >= {"base", "fine-tune", "LoRA", "merge", "int8"}
    assert not {known.made_by for known in trees[0]} & set(bench.MOVED)

    found = bench.pairs(trees, tmp_path)

    assert found["two_trees"] == len(trees[0]) * len(trees[1])
    assert (found["auroc"], found["missed"], found["false_positives"]) == (1.0, 0, 0)
