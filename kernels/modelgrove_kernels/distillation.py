"""A smaller network learns to answer as the one it was made from, stage by stage (knowledge distillation).

The loss is ‖ŷ - y‖² / ‖y‖² of the output and Σ_i w_i ‖f̂_i - f_i‖² / ‖f_i‖² of the stages' features. With w_i that fall
as a stage's sensitivity rises this is the sensitivity-guided distillation of HierarchicalPrune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modelgrove_kernels.calls import Call, output_of, picked

BATCH = 8
"""Samples of one step."""
RATE = 1e-4
"""Of Adam, falling to zero by a cosine."""


def distil(
    student: nn.Module,
    teacher: nn.Module,
    stages: Mapping[str, tuple[str, float]],
    calls: Sequence[Call],
    iterations: int,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda _done: None,
) -> None:
    """Teach the parameters of `student` that require gradients; `stages`: teacher's path → student's path, w_i."""
    learning = [weight for weight in student.parameters() if weight.requires_grad]
    if not learning:
        return
    optimizer = torch.optim.Adam(learning, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations))
    for iteration in range(iterations):
        call = picked(calls, BATCH, generator)
        with torch.no_grad(), _features(teacher, list(stages)) as wanted:
            teacher(*call.positional, **call.named)
        with _features(student, [path for path, _ in stages.values()]) as found:
            answer = output_of(student(*call.positional, **call.named))
        loss = _relative(answer, call.output)
        for path, (own, weight) in stages.items():
            loss = loss + weight * _relative(found[own], wanted[path])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        progress((iteration + 1) / iterations)


@contextmanager
def _features(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules at `paths` answer while the context lasts."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path in paths:

            def keep(_module: nn.Module, _inputs: object, answer: Any, path: str = path) -> None:
                found[path] = output_of(answer)

            hooks.callback(network.get_submodule(path).register_forward_hook(keep).remove)
        yield found


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
