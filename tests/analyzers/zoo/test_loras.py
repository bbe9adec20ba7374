import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from modelgrove_analyzers.zoo.base import v_errors, v_loss
from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.loras import (
    BETAS,
    EPSILON,
    TARGETS,
    Feed,
    LoraStack,
    fresh_lora,
    learning_rate,
    target_modules,
    train_loras,
)
from modelgrove_analyzers.zoo.recipes import Nuisance, draw_recipe
from modelgrove_hub.search.text import token_states


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


def test_loras_trained_together_equal_loras_trained_alone(tiny, pictures, recipes):
    together = train_loras(tiny, pictures, recipes)
    for recipe, lora in zip(recipes, together, strict=True):
        (alone,) = train_loras(tiny, pictures, [recipe])
        assert lora.recipe == recipe
        # Sums run in another order in a larger batch: float32 noise, through at most 8 steps of Adam of size 6e-3.
        assert_same_factors(lora.factors, alone.factors, 1e-5)
        assert lora.last_loss == pytest.approx(alone.last_loss, rel=1e-4)


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
        for down, up in zip(stack.down.values(), stack.up.values(), strict=True):
            assert down.shape[1] == up.shape[2] == 8
            assert not down[index, recipe.rank :].any()
        assert_same_factors(stack.factors(index), fresh_lora(tiny.unet, recipe).factors, 0)


def test_an_untrained_lora_changes_nothing(tiny, recipes):
    noise, states = torch.randn(3, 4, 8, 8), torch.randn(3, 16, 384)
    plain = tiny.unet(noise, 500, states).sample
    with LoraStack(tiny.unet, [fresh_lora(tiny.unet, recipe) for recipe in recipes]).attached(3):
        assert torch.equal(tiny.unet(noise, 500, states).sample, plain)


def test_a_trained_lora_predicts_its_own_pictures_better(tiny, pictures, recipes):
    recipe = replace(recipes[0], steps=40, learning_rate=3e-2)
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
