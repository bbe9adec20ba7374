import copy
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model

from modelgrove_analyzers.zoo.base import v_errors, v_loss
from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.loras import (
    BETAS,
    EPSILON,
    TARGETS,
    Feed,
    Lora,
    LoraStack,
    differences,
    fresh_lora,
    learning_rate,
    target_modules,
    train_loras,
)
from modelgrove_analyzers.zoo.methods import METHODS
from modelgrove_analyzers.zoo.recipes import Method, Nuisance, draw_recipe, in_columns
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.shared_basis import BasisColumns
from modelgrove_hub.search.text import token_states
from modelgrove_kernels.shared_basis import columns


@pytest.fixture
def recipes(pictures):
    """Three LoRAs that differ in rank, alpha, rate, steps and pictures."""
    nuisance = Nuisance(ranks=(2, 4, 8), rank_weights=(1, 1, 1), steps=(3, 8))
    drawn = [draw_recipe(find_concept(n), seed, nuisance, pictures) for seed, n in enumerate(["cat", "pizza", "arrow"])]
    shapes = ((2, 4.0, 5), (8, 4.0, 8), (4, 4.0, 3))
    return [replace(r, rank=rank, alpha=alpha, steps=n) for r, (rank, alpha, n) in zip(drawn, shapes, strict=True)]


def assert_same_factors(one, other, tolerance):
    assert one.keys() == other.keys()
    for module in one:
        for mine, theirs in zip(one[module], other[module], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def of(method, recipes):
    if method is not Method.ORTHOGONAL:
        return [replace(recipe, method=method) for recipe in recipes]
    stops = accumulate(recipe.rank for recipe in recipes)
    return [
        in_columns(r, BasisColumns("zoo", 3, stop - r.rank, r.rank)) for r, stop in zip(recipes, stops, strict=True)
    ]


def shaken(unet, recipe):
    """A LoRA with random parts."""
    generator = torch.Generator().manual_seed(recipe.seed)
    parts = {
        name: tuple(part + 0.1 * torch.randn(part.shape, generator=generator) for part in own)
        for name, own in fresh_lora(unet, recipe).factors.items()
    }
    return Lora(recipe, parts, 0, 0)


@pytest.mark.parametrize("method", list(METHODS))
def test_loras_trained_together_equal_loras_trained_alone(tiny, pictures, recipes, method):
    recipes = of(method, recipes)
    together = train_loras(tiny, pictures, recipes)
    for recipe, lora in zip(recipes, together, strict=True):
        (alone,) = train_loras(tiny, pictures, [recipe])
        assert lora.recipe == recipe
        # Sums run in another order in a larger batch: float32 noise, through at most 8 steps of Adam of size 6e-3.
        assert_same_factors(lora.factors, alone.factors, 1e-5)
        assert lora.last_loss == pytest.approx(alone.last_loss, rel=1e-4)


def test_orthogonal_loras_keep_their_columns_and_so_never_read_each_other(tiny, pictures, recipes):
    loras = train_loras(tiny, pictures, of(Method.ORTHOGONAL, recipes))
    for name, layer in target_modules(tiny.unet).items():
        for lora in loras:
            down, up = lora.factors[name]
            own = lora.recipe.columns
            # Nothing was added to them in training: the very numbers.
            assert torch.equal(down, columns(layer.in_features, own.seed, own.start, own.rank).T)
            assert up.abs().max() > 0
        (a, _), (b, _), (c, _) = (lora.factors[name] for lora in loras)
        assert max((x @ y.T).abs().max() for x, y in ((a, b), (a, c), (b, c))) < 1e-6


def test_columns_that_a_layer_does_not_have_are_refused(tiny, pictures, recipes):
    recipe = in_columns(recipes[0], BasisColumns("zoo", 3, 30, 4))
    with pytest.raises(UsageError, match="a layer has 32 inputs"):
        train_loras(tiny, pictures, [recipe])


def test_a_lora_equals_one_trained_by_peft_and_torch_adam(tiny, pictures, recipes):
    recipe = recipes[1]
    (ours,) = train_loras(tiny, pictures, [recipe])
    unet = copy.deepcopy(tiny.unet).requires_grad_(False)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(TARGETS))
    inject_adapter_in_model(config, unet)
    layers = {name: unet.get_submodule(name) for name in target_modules(tiny.unet)}
    for name, (down, up) in fresh_lora(tiny.unet, recipe).factors.items():
        layers[name].lora_A["default"].weight.data = down.clone()
        layers[name].lora_B["default"].weight.data = up.clone()
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], betas=BETAS, eps=EPSILON)
    feed, states = Feed(tiny, pictures, recipe), token_states([recipe.prompt]).expand(recipe.batch, -1, -1)
    for step in range(recipe.steps):
        latents, times, epsilon = feed.draw()
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        v_errors(unet, tiny.noise, latents, states, times, epsilon).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }
    # Same mathematics, other order of operations: float32 noise through 8 steps of Adam.
    assert_same_factors(ours.factors, theirs, 1e-5)


def test_training_leaves_the_base_as_it_was(tiny, pictures, recipes):
    before = copy.deepcopy(tiny.unet.state_dict())
    train_loras(tiny, pictures, recipes)
    after = tiny.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in tiny.unet.modules())


def test_every_target_gets_trained_factors(tiny, pictures, recipes):
    lora = train_loras(tiny, pictures, recipes)[0]
    attention = [name for name in lora.factors if ".attn" in name]
    assert len(attention) == 32  # four transformer blocks, two attentions each, four projections each
    assert len(lora.factors) - len(attention) == 8  # residual blocks
    for name, (down, up) in lora.factors.items():
        module = tiny.unet.get_submodule(name)
        assert down.shape == (lora.recipe.rank, module.in_features)
        assert up.shape == (module.out_features, lora.recipe.rank)
        assert up.abs().max() > 0


def test_padding_to_the_largest_rank_changes_nothing(tiny, recipes):
    stack = LoraStack(tiny.unet, [fresh_lora(tiny.unet, recipe) for recipe in recipes])
    for index, recipe in enumerate(recipes):
        for down, up in stack.parts.values():
            assert down.shape[1] == up.shape[2] == 8
            assert not down[index, recipe.rank :].any()
        assert_same_factors(stack.factors(index), fresh_lora(tiny.unet, recipe).factors, 0)


@pytest.mark.parametrize("method", list(METHODS))
def test_an_untrained_lora_changes_nothing(tiny, recipes, method):
    recipes = of(method, recipes)
    noise, states = torch.randn(3, 4, 8, 8), torch.randn(3, 16, 384)
    plain = tiny.unet(noise, 500, states).sample
    with LoraStack(tiny.unet, [fresh_lora(tiny.unet, recipe) for recipe in recipes]).attached(3):
        # DoRA divides the weights by their norms and multiplies them again: rounding in float32.
        torch.testing.assert_close(tiny.unet(noise, 500, states).sample, plain, rtol=0, atol=1e-5)


def peft_of(method, unet, lora):
    """The UNet with the LoRA as PEFT applies it: an implementation that shares nothing with ours."""
    unet, recipe = copy.deepcopy(unet), lora.recipe
    common = {"r": recipe.rank, "target_modules": list(TARGETS)}
    config = (
        LoHaConfig(alpha=recipe.alpha, **common)
        if method is Method.LOHA
        else LoraConfig(lora_alpha=recipe.alpha, use_dora=method is Method.DORA, **common)
    )
    inject_adapter_in_model(config, unet)
    for name, parts in lora.factors.items():
        layer = unet.get_submodule(name)
        if method is Method.LOHA:
            slots = (layer.hada_w1_b, layer.hada_w1_a, layer.hada_w2_b, layer.hada_w2_a)
            places = [slot["default"] for slot in slots]
        else:
            places = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            places += [layer.lora_magnitude_vector["default"].weight] if method is Method.DORA else []
        for place, part in zip(places, parts, strict=True):
            place.data = part.reshape(place.shape).clone()
    return unet.eval()


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_acts_as_in_peft_and_its_difference_acts_alike(tiny, recipes, method):
    lora = shaken(tiny.unet, of(method, recipes)[2])
    noise, states = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 384)
    added = copy.deepcopy(tiny.unet)
    with torch.inference_mode():
        with LoraStack(tiny.unet, [lora]).attached(1):
            ours = tiny.unet(noise, 500, states).sample
        for name, update in differences(tiny.unet, lora).items():
            added.get_parameter(f"{name}.weight").add_(update)
        theirs = peft_of(method, tiny.unet, lora)(noise, 500, states).sample
        assert (ours - tiny.unet(noise, 500, states).sample).abs().max() > 1e-2
        # The same sums in another order: float32 noise through a UNet.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours, added(noise, 500, states).sample, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_trained_lora_predicts_its_own_pictures_better(tiny, pictures, recipes, method):
    (recipe,) = of(method, [replace(recipes[0], steps=40, learning_rate=3e-2)])
    (lora,) = train_loras(tiny, pictures, [recipe])
    # The same 64 pictures, noises and times with and without the LoRA.
    feed = Feed(tiny, pictures, replace(recipe, batch=64, seed=99))
    latents, times, epsilon = feed.draw()
    states = token_states([recipe.prompt]).expand(64, -1, -1)
    with torch.inference_mode():
        before = v_errors(tiny.unet, tiny.noise, latents, states, times, epsilon).mean()
        with LoraStack(tiny.unet, [lora]).attached(1):
            after = v_errors(tiny.unet, tiny.noise, latents, states, times, epsilon).mean()
    assert after < 0.9 * before
    # The losses that it carries were measured in the same way, on 16 draws.
    assert lora.first_loss == pytest.approx(before.item(), rel=0.3)
    assert lora.last_loss == pytest.approx(after.item(), rel=0.3)


def test_the_batched_loss_is_the_loss_of_the_base(tiny):
    latents, states = torch.randn(6, 4, 8, 8), torch.randn(6, 16, 384)
    loss = v_loss(tiny.unet, tiny.noise, latents, states, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    times = ((1 + 1.2 * torch.randn(6, generator=generator)).sigmoid() * 1000).long()
    epsilon = torch.randn(latents.shape, generator=generator)
    signal, noise = tiny.noise.alphas_cumprod[times].sqrt(), (1 - tiny.noise.alphas_cumprod[times]).sqrt()
    signal, noise = signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)
    # v = α ε − σ x₀ (Salimans & Ho, arXiv 2202.00512, section 4)
    predicted = tiny.unet(signal * latents + noise * epsilon, times, states).sample
    torch.testing.assert_close(loss, (predicted - (signal * epsilon - noise * latents)).square().mean())
