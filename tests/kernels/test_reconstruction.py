"""Learned rounding against nearest rounding and against every choice there is."""

from itertools import product

import pytest
import torch
from torch import nn

from modelgrove_kernels.calls import Call
from modelgrove_kernels.reconstruction import LearnedRounding, reconstruct


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_grid(weight, scale):
    lower = (weight / scale).floor() * scale
    return lower, lower + scale


def call_of(block, x):
    return [Call(0.0, (x,), {}, block(x).detach())]


def learn(block, weights, calls, iterations=300):
    reconstruct(block, weights, calls, iterations, torch.Generator().manual_seed(0))


def test_it_begins_at_the_weight_and_ends_on_the_grid():
    weight = draw(5, 7)
    lower, upper = on_grid(weight, 0.5)
    relaxed = LearnedRounding(weight, lower, upper)
    torch.testing.assert_close(relaxed(), weight)
    decided = relaxed.decided()
    assert bool(((decided == lower) | (decided == upper)).all())
    assert float((decided - weight).abs().max()) <= 0.25 + 1e-6  # not learned: that is rounding to nearest


def test_a_weight_beyond_the_grid_stays_at_its_end():
    end = torch.tensor([[1.0]])
    relaxed = LearnedRounding(torch.tensor([[3.0]]), end, end)
    assert float(relaxed()) == float(relaxed.decided()) == 1.0
    relaxed().sum().backward()
    assert bool(torch.isfinite(relaxed.choice.grad).all())


def test_the_penalty_is_that_of_the_paper():
    relaxed = LearnedRounding(torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2))
    # h = ½ is undecided whatever β; h = 0 is decided.
    assert float(relaxed.penalty(2.0)) == pytest.approx(0.5)
    assert float(relaxed.penalty(20.0)) == pytest.approx(0.5)


def test_the_best_of_all_choices_is_found_or_nearly():
    """Eight weights with correlated inputs: 256 choices, all tried."""
    layer, scale = nn.Linear(8, 1, bias=False), 0.5
    layer.weight.data = draw(1, 8)
    x = draw(64, 2, seed=1) @ draw(2, 8, seed=2) + 0.1 * draw(64, 8, seed=3)
    lower, upper = on_grid(layer.weight.data, scale)
    relaxed = LearnedRounding(layer.weight.data, lower, upper)
    learn(layer, {"weight": relaxed}, call_of(layer, x))
    choices = [torch.where(torch.tensor([up]), upper, lower) for up in product([False, True], repeat=8)]
    errors = sorted(float(((choice - layer.weight) @ x.T).norm()) for choice in choices)
    nearest = float((((layer.weight / scale).round() * scale - layer.weight) @ x.T).norm())
    found = float(((relaxed.decided() - layer.weight) @ x.T).norm())
    assert found < nearest / 2
    assert found <= errors[len(errors) // 10]  # a heuristic: among the best tenth of all


def test_two_layers_of_a_block_make_up_for_each_other():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 12)).requires_grad_(False)
    x = draw(256, 4, seed=1) @ draw(4, 12, seed=2)
    scales, calls = {"0.weight": 0.2, "2.weight": 0.2}, call_of(block, x)
    weights = {
        name: LearnedRounding(block.get_parameter(name), *on_grid(block.get_parameter(name), scale))
        for name, scale in scales.items()
    }

    def error(values):
        return float((torch.func.functional_call(block, values, (x,)) - calls[0].output).norm())

    before = error({name: (block.get_parameter(name) / 0.2).round() * 0.2 for name in scales})
    learn(block, weights, calls)
    assert error({name: weight.decided() for name, weight in weights.items()}) < 0.7 * before


def test_the_same_seed_gives_the_same_weights():
    layer, found = nn.Linear(6, 3), []
    for _ in range(2):
        relaxed = LearnedRounding(layer.weight.detach(), *on_grid(layer.weight.detach(), 0.3))
        learn(layer, {"weight": relaxed}, call_of(layer, draw(20, 6)), iterations=20)
        found.append(relaxed.decided())
    assert torch.equal(*found)
