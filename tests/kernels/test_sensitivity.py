"""Probed sensitivities against what a change does when it is made."""

import pytest
import torch
from torch import nn

from modelgrove_kernels.calls import Call, output_of
from modelgrove_kernels.sensitivity import sensitivities


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 5))


def calls_of(model, count=4):
    inputs = [draw(8, 10, seed=seed) for seed in range(count)]
    return [Call(0.0, (x,), {}, model(x).detach()) for x in inputs]


def moved(model, name, difference, calls):
    """‖ΔY‖² / ‖Y‖² of a small change, by making it; scaled back to the whole change."""
    small, noise, signal = 1e-3, 0.0, 0.0
    changed = {name: model.get_parameter(name).detach() + small * difference}
    for call in calls:
        answer = torch.func.functional_call(model, changed, call.positional)
        noise += float((output_of(answer) - call.output).square().sum()) / small**2
        signal += float(call.output.square().sum())
    return noise / signal


def test_it_is_the_first_order_change_of_the_output():
    model, generator = network(), torch.Generator().manual_seed(0)
    calls = calls_of(model)
    changes = {
        "0.weight": [0.1 * draw(20, 10, seed=7), 0.01 * draw(20, 10, seed=8)],
        "2.weight": [0.1 * draw(5, 20, seed=9)],
    }
    found = sensitivities(
        model, {name: lambda made=made: made for name, made in changes.items()}, calls, 4000, generator
    )
    for name, differences in changes.items():
        for value, difference in zip(found[name], differences, strict=True):
            # √(2 / 4000) = 2.2 % for one sum, a little more for eight samples at once: five deviations.
            assert value == pytest.approx(moved(model, name, difference, calls), rel=0.15)


def test_a_change_of_nothing_moves_nothing_and_the_network_is_as_before():
    model = network()
    found = sensitivities(
        model, {"0.weight": lambda: [torch.zeros(20, 10)]}, calls_of(model), 2, torch.Generator().manual_seed(0)
    )
    assert found == {"0.weight": [0.0]}
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
    assert not model[0].weight._post_accumulate_grad_hooks
