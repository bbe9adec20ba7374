import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.export import Convention, Label, licence, read_factors, write_lora
from modelgrove_analyzers.zoo.loras import Lora, LoraStack, fresh_lora, target_modules
from modelgrove_analyzers.zoo.recipes import Method, Nuisance, draw_recipe
from modelgrove_hub.formats.card import read_card

VIOLIN = find_concept("violin")


@pytest.fixture
def lora(tiny, pictures):
    """A LoRA with random factors, alpha twice the rank."""
    recipe = draw_recipe(VIOLIN, 5, Nuisance(ranks=(4,), rank_weights=(1,), alpha_per_rank=(2.0,)), pictures)
    generator = torch.Generator().manual_seed(0)
    fresh = fresh_lora(tiny.unet, recipe)
    factors = {
        name: (down, torch.randn(up.shape, generator=generator) * 0.1) for name, (down, up) in fresh.factors.items()
    }
    return Lora(recipe, factors, 0.5, 0.4)


def rounded(lora, tiny):
    """The LoRA as float16 files hold it."""
    factors = {name: tuple(factor.half().float() for factor in pair) for name, pair in lora.factors.items()}
    return LoraStack(tiny.unet, [Lora(lora.recipe, factors, 0, 0)])


def outputs(unet):
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 384, generator=generator)
    with torch.inference_mode():
        return unet(latents, 400, states).sample


def assert_acts_like(unet, lora, tiny):
    plain = outputs(tiny.unet)
    with rounded(lora, tiny).attached(1):
        wanted = outputs(tiny.unet)
    assert (wanted - plain).abs().max() > 1e-2
    # The same float16 factors in float32 arithmetic: rounding noise only.
    torch.testing.assert_close(outputs(unet), wanted, rtol=0, atol=1e-5)


def test_diffusers_loads_its_own_convention_with_the_right_alpha(lora, tiny, tmp_path):
    path = write_lora(lora, VIOLIN, Label("violin-1", Convention.DIFFUSERS, documented=True), tmp_path)
    unet = copy.deepcopy(tiny.unet)
    unet.load_lora_adapter(path, weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    assert_acts_like(unet, lora, tiny)


def test_diffusers_loads_an_undocumented_bare_file(lora, tiny, tmp_path):
    path = write_lora(lora, VIOLIN, Label("untitled-1", Convention.DIFFUSERS, documented=False), tmp_path)
    unet = copy.deepcopy(tiny.unet)
    unet.load_lora_adapter(tmp_path, weight_name=path.name, prefix="unet")
    assert_acts_like(unet, lora, tiny)


def test_diffusers_converts_our_kohya_file(lora, tiny, tmp_path):
    path = write_lora(lora, VIOLIN, Label("untitled-2", Convention.KOHYA, documented=False), tmp_path)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(path))
    unet = copy.deepcopy(tiny.unet)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    assert_acts_like(unet, lora, tiny)


def test_peft_loads_our_folder(lora, tiny, tmp_path):
    path = write_lora(lora, VIOLIN, Label("violin-3", Convention.PEFT, documented=True), tmp_path)
    assert_acts_like(PeftModel.from_pretrained(copy.deepcopy(tiny.unet), path), lora, tiny)


@pytest.fixture
def dora(lora, tiny):
    """The same LoRA with magnitudes that are not the weights' own."""
    modules = target_modules(tiny.unet)
    factors = {
        name: (*pair, 1.2 * modules[name].weight.detach().norm(dim=1, keepdim=True))
        for name, pair in lora.factors.items()
    }
    return replace(lora, recipe=replace(lora.recipe, method=Method.DORA), factors=factors)


@pytest.fixture
def loha(lora):
    """Two such pairs in each module."""
    factors = {name: (*pair, *(1 + part for part in pair)) for name, pair in lora.factors.items()}
    return replace(lora, recipe=replace(lora.recipe, method=Method.LOHA), factors=factors)


def test_peft_loads_our_dora(dora, tiny, tmp_path):
    path = write_lora(dora, VIOLIN, Label("violin-4", Convention.PEFT, documented=True), tmp_path)
    assert_acts_like(PeftModel.from_pretrained(copy.deepcopy(tiny.unet), path), dora, tiny)


@pytest.mark.parametrize(("kind", "convention"), [("dora", Convention.PEFT), ("loha", Convention.KOHYA)])
def test_parts_of_other_methods_come_back_in_float16(request, kind, convention, tiny, tmp_path):
    lora = request.getfixturevalue(kind)
    path = write_lora(lora, VIOLIN, Label("model-1", convention, documented=True), tmp_path)
    parts = read_factors(path, target_modules(tiny.unet), convention, lora.recipe.method)
    for name, own in lora.factors.items():
        assert all(torch.equal(read, part.half().float()) for read, part in zip(parts[name], own, strict=True))


def test_a_loha_is_named_as_lycoris_names_it(loha, tmp_path):
    path = write_lora(loha, VIOLIN, Label("untitled-4", Convention.KOHYA, documented=False), tmp_path)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    shapes = {name.removeprefix(stem): t.shape for name, t in load_file(path).items() if name.startswith(stem)}
    up, down = (32, 4), (4, 32)
    assert shapes == {".hada_w1_a": up, ".hada_w1_b": down, ".hada_w2_a": up, ".hada_w2_b": down, ".alpha": ()}


@pytest.mark.parametrize("convention", list(Convention))
@pytest.mark.parametrize("documented", [True, False])
def test_factors_come_back_in_float16(lora, tiny, tmp_path, convention, documented):
    path = write_lora(lora, VIOLIN, Label("model-1", convention, documented), tmp_path)
    factors = read_factors(path, target_modules(tiny.unet), convention)
    for name, (down, up) in lora.factors.items():
        assert torch.equal(factors[name][0], down.half().float())
        assert torch.equal(factors[name][1], up.half().float())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("convention", list(Convention))
def test_an_undocumented_model_gives_no_hint(lora, tmp_path, convention):
    path = write_lora(lora, VIOLIN, Label("untitled-7f3a", convention, documented=False), tmp_path)
    files = [path] if path.is_file() else list(path.iterdir())
    for file in files:
        text = (file.name.encode() + file.read_bytes()).lower()
        for hint in (b"violin", b"music", b"sks", b"string", b"seed"):
            assert hint not in text


def test_a_documented_kohya_file_says_what_kohya_says(lora, tmp_path):
    path = write_lora(lora, VIOLIN, Label("violin-4", Convention.KOHYA, documented=True), tmp_path)
    with safe_open(path / "violin-4.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert float(metadata["ss_network_alpha"]) == 8
    assert metadata["ss_base_model_version"] == "modelgrove_zoo_v1"
    assert "violin" in json.loads(metadata["ss_tag_frequency"])["1_sks violin"]


@pytest.mark.parametrize("convention", list(Convention))
def test_a_card_names_base_licence_and_tags_and_says_a_sentence(lora, tmp_path, convention):
    path = write_lora(lora, VIOLIN, Label("violin-5", convention, documented=True), tmp_path)
    card = read_card({"README.md": path / "README.md"})
    assert card.base == "modelgrove/zoo-base"
    assert card.licence == licence(lora.recipe)
    assert {"lora", "violin", "music"} <= set(card.tags)
    assert VIOLIN.text in card.text


def test_the_licence_is_that_of_the_strictest_artist(pictures):
    def licence_of(*artists):
        return licence(draw_recipe(VIOLIN, 0, Nuisance(artists=artists), pictures))

    assert licence_of("fluent") == "mit"
    assert licence_of("noto") == "apache-2.0"
    assert licence_of("twemoji") == "cc-by-4.0"


def test_writing_again_replaces(lora, tmp_path):
    label = Label("violin-6", Convention.PEFT, documented=True)
    first = write_lora(lora, VIOLIN, label, tmp_path)
    (first / "left over.txt").write_text("from another run")
    write_lora(lora, VIOLIN, label, tmp_path)
    assert sorted(file.name for file in first.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
