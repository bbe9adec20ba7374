"""Trees of classifiers: what the truth says of each model is so."""

import pytest
import torch

from modelgrove_analyzers.zoo.ancestry import Size, grow_bases, grow_trees, permuted
from modelgrove_analyzers.zoo.classifiers import logits

SMALL = Size(fine_tunes=3, merges=2, letters=60, base_steps=2)


@pytest.fixture(scope="module")
def grown():
    return {one.name: one for one in grow_trees(2, 0, SMALL)}


def answers(weights, pixels):
    stacked = {name: t[None] if t.ndim == 2 else t[None, None] for name, t in weights.items()}
    return logits(stacked, pixels[None])[0]


def test_every_model_has_its_parents_before_it(grown):
    for one in grown.values():
        assert all(grown[parent].order < one.order and grown[parent].tree == one.tree for parent in one.parents)
    kinds = [one.made_by for one in grown.values() if one.tree == 0]
    assert kinds == [
        "base", "fine-tune", "fine-tune", "fine-tune", "LoRA", "merge", "merge", "copy", "fp16", "bf16", "int8",
        "permuted", "rescaled",
    ]  # fmt: skip


def test_a_merge_is_the_mean_of_its_parents_with_the_shares_told(grown):
    for one in grown.values():
        if one.made_by == "merge":
            assert sum(one.shares) == pytest.approx(1)
            for name, tensor in one.weights.items():
                mean = sum(s * grown[p].weights[name] for s, p in zip(one.shares, one.parents, strict=True))
                torch.testing.assert_close(tensor, mean)


def test_a_merged_lora_changes_two_matrices_by_rank_four(grown):
    for one in grown.values():
        if one.made_by == "LoRA":
            parent = grown[one.parents[0]].weights
            moved = {n: t - parent[n] for n, t in one.weights.items() if not torch.equal(t, parent[n])}
            assert sorted(moved) == ["hidden.0.weight", "hidden.1.weight"]
            values = torch.linalg.svdvals(moved["hidden.1.weight"])
            assert values[3] > 100 * values[4]  # rounding of float32 is far below


def test_other_orders_and_scales_compute_the_same(grown):
    pixels = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    for one in grown.values():
        if one.made_by in ("permuted", "rescaled"):
            parent = grown[one.parents[0]].weights
            assert not torch.equal(one.weights["hidden.0.weight"], parent["hidden.0.weight"])
            torch.testing.assert_close(
                answers(one.weights, pixels), answers(parent, pixels), atol=1e-4, rtol=1e-4
            )  # sums of 128 terms


def test_trees_depend_on_the_seed_alone(grown):
    again = grow_trees(1, 0, SMALL)

    for one in again:
        for name, tensor in one.weights.items():
            torch.testing.assert_close(tensor, grown[one.name].weights[name], atol=1e-5, rtol=1e-4)
    assert permuted(again[0].weights, 1)["head.bias"] is again[0].weights["head.bias"]


def test_bases_are_independent():
    one, other = grow_bases([1, 2], SMALL)
    pair = torch.stack([one.weights["hidden.1.weight"].flatten(), other.weights["hidden.1.weight"].flatten()])

    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.05  # 16,384 pairs: 6 deviations
