from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from modelgrove_analyzers.zoo.chains import (
    ROOT,
    Average,
    ExactCopy,
    FineTune,
    Fused,
    HalfCopy,
    grow_family,
    sample_family,
)
from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.loras import target_modules
from modelgrove_analyzers.zoo.recipes import Nuisance

FAMILY = (
    FineTune("first", (ROOT,), ("cat", "dog"), 1, steps=2, batch=4),
    FineTune("second", ("first",), ("rose",), 2, steps=2, batch=4),
    FineTune("sibling", ("first",), ("car",), 3, steps=2, batch=4),
    Average("merged", ("second", "sibling"), (0.75, 0.25)),
    HalfCopy("half", ("second",)),
    ExactCopy("renamed", ("second",)),
    Fused("fused", ("sibling",), "crown", 4, Nuisance(ranks=(2,), rank_weights=(1,), steps=(3, 3))),
)


@pytest.fixture(scope="module")
def grown(tiny, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    truth = grow_family(FAMILY, tiny, pictures, folder)
    weights = {row["name"]: load_file(folder / row["path"] / "diffusion_pytorch_model.safetensors") for row in truth}
    return truth, {"base": tiny.unet.state_dict(), **weights}


def test_the_truth_names_parents_and_relations(grown):
    truth, _ = grown
    assert [(row["name"], row["parents"], row["relation"]) for row in truth] == [
        ("first", ["base"], "finetune"),
        ("second", ["first"], "finetune"),
        ("sibling", ["first"], "finetune"),
        ("merged", ["second", "sibling"], "merge"),
        ("half", ["second"], "quantized"),
        ("renamed", ["second"], "copy"),
        ("fused", ["sibling"], "finetune"),
    ]
    assert truth[0]["recipe"]["concepts"] == ("cat", "dog")


def test_fine_tunes_move_away_from_their_parents_step_by_step(grown):
    _, weights = grown

    def distance(one, other):
        return sum((weights[one][n] - weights[other][n]).square().sum() for n in weights["base"]).sqrt()

    assert 0 < distance("base", "first") < distance("base", "second")
    assert distance("first", "second") < distance("sibling", "second")


def test_a_merge_is_the_weighted_mean_and_copies_are_copies(grown):
    _, weights = grown
    for name, merged in weights["merged"].items():
        torch.testing.assert_close(merged, 0.75 * weights["second"][name] + 0.25 * weights["sibling"][name])
        assert torch.equal(weights["half"][name], weights["second"][name].half())
        assert torch.equal(weights["renamed"][name], weights["second"][name])


def test_a_fused_lora_has_its_rank_and_touches_attention_alone(grown, tiny):
    _, weights = grown
    targets = {f"{name}.weight" for name in target_modules(tiny.unet)}
    for name, fused in weights["fused"].items():
        change = fused - weights["sibling"][name]
        assert bool(change.any()) == (name in targets)
        if name in targets:
            values = torch.linalg.svdvals(change.double())
            # Adding to the weight rounds to float32: relative 6e-8 of the weight, far below the change.
            assert values[2] < 1e-2 * values[0]


def test_growing_again_leaves_what_is_there(tiny, pictures, tmp_path):
    grow_family(FAMILY[:2], tiny, pictures, tmp_path)
    marker = tmp_path / "first" / "marker"
    marker.touch()
    truth = grow_family(FAMILY[:3], tiny, pictures, tmp_path)
    assert marker.exists()
    assert [row["name"] for row in truth] == ["first", "second", "sibling"]


def test_in_the_sample_family_parents_come_first_and_concepts_exist():
    names = {ROOT}
    for node in sample_family():
        assert set(node.parents) <= names
        names.add(node.name)
        for concept in getattr(node, "concepts", ()):
            find_concept(concept)
    assert replace(sample_family()[0], seed=0) == replace(sample_family(seed=5)[0], seed=0)
