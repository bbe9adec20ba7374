"""`modelgrove merge` and `modelgrove recipe` as people type them."""

import hashlib

import pytest
import torch
import yaml

from modelgrove_hub.cli.merge import _tell, merge, recipe
from modelgrove_hub.errors import UsageError
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.models import find_revision

SUM = ("--method", "sum")
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def lora(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"unet.{MODULE}.to_{name}.lora_{side}.weight": torch.randn(*shape, generator=generator)
        for name in "qkv"
        for side, shape in (("A", (2, 16)), ("B", (16, 2)))
    }


@pytest.fixture
def loras(register):
    return [register(name, lora(seed)) for seed, name in enumerate(("a", "b"))]


def weights_of(hub, name):
    with hub.reading() as session:
        revision = find_revision(session, name).id
    model = load_input(hub, revision)
    return {tensor.name: tensor.read() for tensor in model.tensors()}, model


def hashed(hub, name):
    [path] = weights_of(hub, name)[1].files().values()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def product(tensors, name):
    return tensors[f"unet.{MODULE}.to_{name}.lora_B.weight"] @ tensors[f"unet.{MODULE}.to_{name}.lora_A.weight"]


def test_weights_stand_behind_the_names(hub, loras, run):
    a, b = loras
    run(merge, f"{a}:0.5", b, *SUM, "--name", "joined", "--local")
    found, _ = weights_of(hub, "joined")
    wanted = 0.5 * product(lora(0), "q") + product(lora(1), "q")
    assert torch.allclose(product(found, "q"), wanted, atol=1e-4)


def test_a_block_s_factor_is_for_one_model_or_for_all(hub, loras, run):
    run(
        merge,
        *loras,
        "--blocks",
        f"2:{MODULE}.to_q=0",
        "--blocks",
        f"{MODULE}.to_k=0.5",
        *SUM,
        "--name",
        "j",
        "--local",
    )
    found, _ = weights_of(hub, "j")
    assert torch.allclose(product(found, "q"), product(lora(0), "q"), atol=1e-4)
    assert torch.allclose(product(found, "k"), 0.5 * (product(lora(0), "k") + product(lora(1), "k")), atol=1e-4)


def test_a_base_takes_the_adapters_in(hub, loras, register, run):
    base = register("base", {f"{MODULE}.to_{name}.weight": torch.ones(16, 16) for name in "qkv"})
    run(merge, f"{loras[0]}:0.5", "--base", base, "--name", "baked", "--local")
    found, _ = weights_of(hub, "baked")
    assert torch.allclose(found[f"{MODULE}.to_q.weight"], 1 + 0.5 * product(lora(0), "q"), atol=1e-4)


def test_a_recipe_gives_the_same_bytes_again_when_models_were_renamed(hub, loras, run, tmp_path):
    a, b = loras
    run(merge, f"{a}:0.5", f"{b}:2", "--method", "dare", "--name", "first", "--local")
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(run(recipe, "first", text=True)), "utf-8")
    fields = yaml.safe_load(path.read_text("utf-8"))
    assert (fields["method"], [model["weight"] for model in fields["models"]]) == ("dare", [0.5, 2.0])
    fields["models"][0]["name"] = "was-renamed"
    path.write_text(yaml.safe_dump(fields), "utf-8")
    run(merge, "--recipe", str(path), "--name", "second", "--local")
    one, two = (weights_of(hub, name)[0] for name in ("first", "second"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_recipe_gives_the_same_file(hub, loras, run, tmp_path):
    run(merge, *loras, "--method", "dare", "--name", "first", "--local")
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(run(recipe, "first", text=True)), "utf-8")
    run(merge, "--recipe", str(path), "--name", "second", "--local")
    assert hashed(hub, "first") == hashed(hub, "second")


def test_mergekit_s_recipe_is_followed(hub, loras, run, tmp_path):
    path = tmp_path / "mergekit.yaml"
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in loras]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}), "utf-8")
    run(merge, "--recipe", str(path), "--name", "linear", "--local")
    found, _ = weights_of(hub, "linear")
    assert torch.allclose(product(found, "v"), 0.5 * (product(lora(0), "v") + product(lora(1), "v")), atol=1e-4)


def test_a_plan_writes_nothing_and_shows_the_pairs(hub, loras, run):
    job = run(merge, *loras, "--plan", "--local")
    [pair] = job["outputs"]["report"]["pairs"]
    assert {pair["a"], pair["b"]} == set(loras)
    assert job["outputs"]["models"] == []
    lines = run(merge, *loras, "--plan", "--local", text=True)
    assert pair["verdict"] in lines[1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "nothing to merge"),
        (("a:0.5", "b", "--weights", "1"), "not both"),
        (("a", "--recipe", __file__), "give it alone"),
        (("a", "b", "--blocks", "up_blocks"), "PREFIX=FACTOR"),
        (("a", "b", "--blocks", "up_blocks=nan"), "PREFIX=FACTOR"),
        (("a:0.5", "b", "--method", "lcsc", "--pictures", "."), "finds the weights itself"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, match, loras, run):
    with pytest.raises(UsageError, match=match):
        run(merge, *arguments, "--local")


def test_what_a_method_notes_is_told(capsys):
    _tell({"notes": ["the winner scores 1"], "warnings": ["it is close"]})
    assert capsys.readouterr().err.splitlines() == ["the winner scores 1", "warning: it is close"]
