"""Train many small classifiers at once, each exactly as if it were trained alone.

A classifier is a perceptron with two hidden layers of rectified linear units. N of them are stacks of N matrices,
trained by batched products; the batch is (N, b, …), classifier by classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modelgrove_analyzers.zoo.base import Progress
from modelgrove_analyzers.zoo.loras import StackedAdam

LAYERS = ("hidden.0", "hidden.1", "head")
HIDDEN = 128


@dataclass(frozen=True)
class Schedule:
    """How one classifier is trained: Adam, decoupled weight decay, a rate that falls linearly to zero."""

    learning_rate: float
    weight_decay: float
    steps: int


Weights = dict[str, Tensor]
"""By name, as in a model's file: "head.weight" (N, out, in), "head.bias" (N, 1, out)."""


def fresh_layer(name: str, shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Weights:
    """A layer (out, in) of as many classifiers as there are generators, started as torch starts a linear layer."""
    out, width = shape
    bound = width**-0.5
    drawn = [torch.empty(out, width + 1).uniform_(-bound, bound, generator=generator) for generator in generators]
    both = torch.stack(drawn)
    return {f"{name}.weight": both[:, :, :-1].clone(), f"{name}.bias": both[:, None, :, -1].clone()}


def logits(weights: Weights, pixels: Tensor) -> Tensor:
    """(N, b, classes) for pictures (N, b, in)."""
    for name in LAYERS:
        pixels = torch.baddbmm(weights[f"{name}.bias"], pixels, weights[f"{name}.weight"].mT)
        if name != LAYERS[-1]:
            pixels = pixels.relu()
    return pixels


def train_classifiers(
    weights: Weights,
    schedules: Sequence[Schedule],
    draw: Callable[[int], tuple[Tensor, Tensor]],
    progress: Progress = lambda _done, _message: None,
) -> None:
    """Change `weights` in place. `draw(n)` gives a batch of the first n: pictures (n, b, in), classes (n, b).

    Classifiers stand in the order of falling steps: one that has done its own leaves the batch.
    """
    optimizer = StackedAdam(list(weights.values()))
    total, done = sum(schedule.steps for schedule in schedules), 0
    for step in range(schedules[0].steps):
        active = [schedule for schedule in schedules if schedule.steps > step]
        current = {name: tensor[: len(active)].detach().requires_grad_() for name, tensor in weights.items()}
        pixels, classes = draw(len(active))
        # The sum of each one's mean: every classifier gets the gradients that it would get alone.
        loss = cross_entropy(logits(current, pixels).flatten(0, 1), classes.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss / classes.shape[1], list(current.values()))
        rates = torch.tensor([one.learning_rate * (1 - step / one.steps) for one in active])
        decays = rates * torch.tensor([one.weight_decay for one in active])
        for tensor in weights.values():
            tensor[: len(active)] *= (1 - decays).view(-1, 1, 1)
        optimizer.step(gradients, rates)
        done += len(active)
        progress(done / total, f"step {step + 1}, {len(active)} classifiers")


@torch.no_grad()
def accuracy(weights: Weights, pixels: Tensor, classes: Tensor) -> float:
    """The share of pictures (b, in) that the one classifier in `weights` tells right."""
    found = logits(weights, pixels[None])[0].argmax(1)
    return round(float((found == classes).float().mean()), 4)
