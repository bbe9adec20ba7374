"""Block-wise reconstruction: weights on a grid that are learned until a block answers as it did before.

AdaRound (Nagel et al., arXiv 2004.10568) learns whether each weight is rounded up or down; BRECQ (Li et al.,
arXiv 2102.05426) does so for a whole block at once, which sees what its layers lose together. The engine knows
only `Relaxed` weights, so that choices of another kind (a codebook's entries, say) are learned by the same loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from modelgrove_kernels.calls import Call, output_of, picked

BATCH = 8
"""Samples of one step."""
_WARM = 0.2
"""Share of the steps before choices are pulled to decisions."""
_SHARP, _BLUNT = 2.0, 20.0
"""β of AdaRound, from the second to the first."""
_PULL = 1.0
"""λ: with the loss relative and the penalty a mean, 1 was the best of .01 … 3 on the zoo's base."""
_STRETCH = 1.1
"""ζ - γ of AdaRound: sigmoids reach 0 and 1."""


class Relaxed(Protocol):
    """A weight under learning, as a function of its parameters."""

    def __call__(self) -> Tensor:
        """The weight as it is now, float32 in its layer's shape, differentiable."""

    def penalty(self, exponent: float) -> Tensor:
        """The mean distance of the choices from decisions, in [0, 1]; a high `exponent` lets undecided ones alone."""

    def rates(self) -> Sequence[tuple[nn.Parameter, float]]:
        """The parameters and their learning rates."""


class LearnedRounding(nn.Module):
    """Each weight is one of its two neighbours on a grid: lower + (upper - lower) · h(V), with AdaRound's h.

    h(V) = clip(1.1 · sigmoid(V) - 0.05, 0, 1) (equation 23) begins where the weight is exact; a weight off the grid's
    ends begins at its end. All tensors are float32 of the layer's shape, or broadcast to it.
    """

    RATE = 0.3
    """Some hundred steps must carry a choice across; AdaRound's 1e-3 is for 20,000."""

    def __init__(self, weight: Tensor, lower: Tensor, upper: Tensor, rate: float = RATE) -> None:
        super().__init__()
        self._rate = rate
        self.lower, self.step = lower, upper - lower
        place = ((weight - lower) / torch.where(self.step == 0, 1.0, self.step)).clamp(0, 1)
        share = (place + (_STRETCH - 1) / 2) / _STRETCH
        self.choice = nn.Parameter(torch.logit(share))

    def _soft(self) -> Tensor:
        return (_STRETCH * torch.sigmoid(self.choice) - (_STRETCH - 1) / 2).clamp(0, 1)

    def forward(self) -> Tensor:
        """The weight with its soft choices."""
        return self.lower + self.step * self._soft()

    def penalty(self, exponent: float) -> Tensor:
        """1 - |2h - 1|^β (equation 24), the mean."""
        return (1 - (2 * self._soft() - 1).abs().pow(exponent)).mean()

    def rates(self) -> Sequence[tuple[nn.Parameter, float]]:
        """V."""
        return [(self.choice, self._rate)]

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The weight with each choice made, exactly on the grid."""
        return torch.where(self._soft() >= 0.5, self.lower + self.step, self.lower)


def reconstruct(
    block: nn.Module,
    weights: Mapping[str, Relaxed],
    calls: Sequence[Call],
    iterations: int,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda _done: None,
) -> None:
    """Learn `weights`, parameters of `block` by name, until it answers `calls` as they say.

    The loss is ‖ŷ - y‖² / ‖y‖² + λ · the penalties' mean, minimised by Adam over batches of `BATCH` samples.
    """
    rates = [pair for weight in weights.values() for pair in weight.rates()]
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": rate} for parameter, rate in rates])
    power = float(torch.stack([call.output.square().mean() for call in calls]).mean()) or 1.0
    for iteration in range(iterations):
        call = picked(calls, BATCH, generator)
        done = iteration / iterations
        answer = output_of(
            torch.func.functional_call(
                block, {name: weight() for name, weight in weights.items()}, call.positional, dict(call.named)
            )
        )
        loss = (answer - call.output).square().mean() / power
        if done >= _WARM:
            share = (done - _WARM) / (1 - _WARM)
            exponent = _SHARP + (_BLUNT - _SHARP) * (1 - share)
            loss = loss + _PULL * torch.stack([weight.penalty(exponent) for weight in weights.values()]).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        progress(done)
