"""Which tree real models are put in: the zoo's base and LoRAs, and the same on another base."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from other_base import BASE, declare, sample, shuffled
from safetensors.torch import load_file, save_file
from sqlmodel import delete, select

from modelgrove_hub.cli.show import show
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.models import find, find_revision
from modelgrove_hub.registry.routing import route
from modelgrove_hub.registry.trees import find_root
from modelgrove_hub.search.groups import fits_none
from modelgrove_hub.tables import Model, Sketch

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(own_hub):
    """A hub of this process: what databases do differently does not matter to trees."""
    return own_hub


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another base, and eight LoRAs of it."""
    folder = tmp_path_factory.mktemp("other")
    loras = [shuffled(path, folder / f"{path.stem}-of-other") for path in sample(8, start=20)]
    return shuffled(BASE, folder / "other-base"), loras


def add(hub, *paths):
    """Ingest; the trees by model name."""
    results = list(ingest(hub, paths, "reference"))
    assert {one.outcome for one in results} == {"new"}, [one.reason for one in results]
    return trees(hub, [one.name for one in results])


def trees(hub, names):
    with hub.reading() as session:
        return {name: find(session, name).tree for name in names}


def reason(hub, name):
    with hub.reading() as session:
        return find(session, name).tree_reason


def unet(path, change, dtype=None):
    """A checkpoint made from the base's network by a change of each tensor."""
    tensors = {name: change(tensor.float()) for name, tensor in load_file(BASE / UNET).items()}
    save_file({name: t.to(dtype or t.dtype).contiguous() for name, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("base_first", [True, False])
def test_loras_and_their_base_are_one_tree_in_either_order(hub, base_first):
    loras = sample(6)
    found = add(hub, BASE, *loras) if base_first else add(hub, *loras, BASE)
    assert set(found.values()) == {"zoo"}
    with hub.reading() as session:
        assert find_root(session, "zoo").name == "local/zoo-base"
    others = [reason(hub, name)["by"] for name in found]
    assert others.count("founder") == 1
    assert others.count("weights") == 6


def test_two_bases_of_one_architecture_are_two_trees_and_each_gets_its_loras(hub, other):
    base, loras = other
    add(hub, BASE, base)
    own = add(hub, *sample(8))
    theirs = add(hub, *loras)
    assert set(own.values()) == {"zoo"}
    assert set(theirs.values()) == {"zoo:local/other-base"}


def test_loras_of_two_bases_that_nobody_has_are_told_apart(hub, other):
    mixed = [path for pair in zip(sample(8), other[1], strict=True) for path in pair]
    add(hub, *mixed)
    with hub.reading() as session:
        rows = {model.name: model.tree for model in session.exec(select(Model))}
    of_other = {tree for name, tree in rows.items() if "of-other" in name}
    of_ours = {tree for name, tree in rows.items() if "of-other" not in name}
    # One pair of LoRAs may be too unlike to begin a tree: who is left has none, and no other's.
    assert not (of_other & of_ours) - {None}
    assert sum(tree is not None for tree in rows.values()) >= 14
    assert len({tree for tree in rows.values() if tree}) == 2


def test_a_base_that_comes_later_takes_the_loras_that_had_no_tree(hub, other, tmp_path):
    stray = shuffled(sample(1, start=30)[0], tmp_path / "stray")
    add(hub, BASE, *sample(3))
    assert set(add(hub, stray).values()) == {None}
    add(hub, other[0])
    assert trees(hub, ["stray"]) == {"stray": "zoo:local/other-base"}


def test_a_lora_of_a_third_base_has_no_tree_and_is_counted(hub, other, tmp_path):
    add(hub, BASE, other[0], *sample(6), *other[1][:6])
    found = add(hub, shuffled(sample(1, start=40)[0], tmp_path / "third", seed=7))
    assert set(found.values()) == {None}
    said = reason(hub, "third")["said"]
    assert said.startswith("it moves other outputs than all trees of family zoo: likeness")
    with hub.reading() as session:
        assert fits_none(session) == {"zoo": 1}


def test_a_declared_base_is_believed_only_if_the_weights_agree(hub, other, tmp_path):
    folders = [path for path in sample(60) if path.is_dir()]
    true = declare(shuffled(folders[0], tmp_path / "true"), "local/other-base")
    lie = declare(shuffled(folders[1], tmp_path / "lie"), "local/zoo-base")
    add(hub, BASE, other[0])
    assert set(add(hub, true, lie).values()) == {"zoo:local/other-base"}
    assert reason(hub, "true")["declared_agrees"] is True
    assert reason(hub, "lie")["declared_agrees"] is False
    shown = CliRunner().invoke(show, ["lie"], catch_exceptions=False).output
    assert "declares base local/zoo-base, but its weights do not agree" in " ".join(shown.split())


def test_what_became_of_a_base_stays_in_its_tree_and_knows_it(hub, other, tmp_path):
    noise = torch.Generator().manual_seed(0)

    def tune(weight):
        return weight + 0.1 * weight.std().nan_to_num() * torch.randn(weight.shape, generator=noise)

    made = [unet(tmp_path / "tuned.safetensors", tune)]
    made.append(unet(tmp_path / "rounded.safetensors", lambda weight: weight, torch.bfloat16))
    found = add(hub, BASE, other[0], *made)
    assert found == {
        "local/zoo-base": "zoo", "local/other-base": "zoo:local/other-base",
        "local/tuned": "zoo", "local/rounded": "zoo",
    }  # fmt: skip
    with hub.reading() as session:
        numbers = {name: find_revision(session, name).id for name in ("tuned", "zoo-base")}
    tuned, base = (load_input(hub, numbers[name]) for name in ("tuned", "zoo-base"))
    assert base.base is None
    assert tuned.base.name == "local/zoo-base"
    assert tuned.base.base is None
    assert any(tensor.key == "conv_in.weight" for tensor in tuned.base.tensors())


def test_a_base_whose_files_are_gone_is_no_base(hub, tmp_path):
    copied = shuffled(BASE, tmp_path / "base", seed=3)
    add(hub, copied, shuffled(sample(1)[0], tmp_path / "lora", seed=3))
    with hub.reading() as session:
        lora = find_revision(session, "lora").id
    assert load_input(hub, lora).base.name == "local/base"
    (copied / UNET).unlink()
    assert load_input(hub, lora).base is None


def mlp(seed, scale=0.0):
    """Two matrices of a classifier of nobody's family; with `scale` what training made of the first."""
    start, more = (torch.Generator().manual_seed(number) for number in (seed, 99))
    shapes = {"fc1.weight": (64, 64), "fc2.weight": (32, 64), "fc3.weight": (10, 32)}
    return {
        name: torch.randn(shape, generator=start) + scale * torch.randn(shape, generator=more)
        for name, shape in shapes.items()
    }


def test_networks_of_unknown_family_make_a_tree_when_there_are_two(hub, tmp_path):
    for name, tensors in {"one": mlp(1), "stranger": mlp(2), "tuned": mlp(1, 0.3)}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    alone = add(hub, tmp_path / "one.safetensors", tmp_path / "stranger.safetensors")
    assert set(alone.values()) == {None}
    assert reason(hub, "one")["said"] == "its weights agree with no other model of its size"
    add(hub, tmp_path / "tuned.safetensors")
    assert trees(hub, ["one", "tuned", "stranger"]) == {
        "one": "unknown:local/one", "tuned": "unknown:local/one", "stranger": None,
    }  # fmt: skip


@pytest.mark.parametrize("base_first", [True, False])
def test_a_base_with_another_head_is_known_by_the_cards_that_name_it_and_by_its_weights(hub, tmp_path, base_first):
    """Cards give the name that the base had where they were written, and a name alone is not believed."""
    base, first, second, liar = (tmp_path / name for name in ("letters", "three", "seven", "liar"))
    for folder, tensors in ((base, mlp(1)), (first, mlp(1, 0.2)), (second, mlp(1, 0.3)), (liar, mlp(5))):
        folder.mkdir()
        if folder != base:
            tensors["fc3.weight"] = torch.randn(4, 32)
            (folder / "README.md").write_text("---\nbase_model: someone/letters\n---\nA classifier.\n")
        save_file(tensors, folder / f"{folder.name}.safetensors")
    for folder in (base, first, second, liar) if base_first else (first, second, liar, base):
        add(hub, folder)
    found = trees(hub, ["letters", "three", "seven", "liar"])
    assert len({found["letters"], found["three"], found["seven"]}) == 1
    assert found["letters"] is not None
    assert found["liar"] is None
    with hub.reading() as session:
        assert find_root(session, found["letters"]).name == "local/letters"
        three = find_revision(session, "three").id
    assert load_input(hub, three).base.name == "local/letters"


def test_a_database_older_than_trees_is_routed_by_weights(hub, other):
    add(hub, BASE, other[0], *sample(6), *other[1][:6])
    with hub.reading() as session:
        before = {model.name: model.tree for model in session.exec(select(Model))}
    with hub.transaction() as session:  # as the migration leaves them
        session.exec(delete(Sketch))
        for model in session.exec(select(Model)):
            adapter = model.kind == "adapter"
            model.tree, model.tree_reason = (model.family, {"by": "family"}) if adapter else (None, None)
    done = route(hub)
    assert (done.models, done.skipped) == (14, {})
    with hub.reading() as session:
        assert {model.name: model.tree for model in session.exec(select(Model))} == before
    assert route(hub).models == 0
    assert route(hub, again=True).moved == {}


def test_the_trees_of_a_job_s_outputs_are_their_parents(hub, tmp_path):
    from modelgrove_hub.cli.compress import compress

    add(hub, BASE)
    done = CliRunner().invoke(
        compress, ["zoo-base", "--bits", "4", "--name", "small", "--local", "--json"], catch_exceptions=False
    )
    (name,) = json.loads(done.stdout)["outputs"]["models"]
    assert trees(hub, [name]) == {name: "zoo"}
    assert reason(hub, name)["by"] in ("parent", "weights")
