"""SVDQuant: outliers go to the weights, and there into a branch of low rank (Li et al., arXiv 2411.05007).

    x W^T ≈ Q(x / s) · Q(R)^T + (x / s) · (L₁ L₂)^T,   Ŵ = W · diag(s),   R = Ŵ - L₁ L₂

Smoothing with s moves what stands out in the inputs to the weights (section 4.2); the leading singular directions of Ŵ
take it from there (equation 6), so that the residual R and the smoothed inputs are both easy to round. Branch
and residual are found in turns while the layer's output error on a sample of its inputs falls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modelgrove_kernels.calibration import LayerInputs
from modelgrove_kernels.emulation import ActivationRule, round_activations
from modelgrove_kernels.gptq import gptq
from modelgrove_kernels.lowrank import leading
from modelgrove_kernels.packing import Packed, dequantize, quantize

STRENGTHS = tuple(step / 20 for step in range(20))
"""α of the search: how much of the inputs' outliers the weights take."""
ROUNDS = 100
"""Turns between branch and residual, at most."""
_TINY = 1e-5
"""Of the largest: channels that are smaller are smoothed as if they had this size."""


@dataclass(frozen=True)
class Branched:
    """A rounded residual (rows, columns) with its branch and smoothing; errors are ‖ŷ - y‖² / ‖y‖² on the sample."""

    residual: Packed
    smooth: Tensor
    """s (columns,), float16."""
    up: Tensor
    """L₁ (rows, rank), float16 unless that overflows."""
    down: Tensor
    """L₂ (rank, columns), as L₁."""
    strength: float | None
    """α that won; None is no smoothing."""
    rounds: int
    """Turns that were made."""
    error: float


def svdquant(
    weight: Tensor, inputs: LayerInputs, group: int, rank: int, rule: ActivationRule, rounds: int = ROUNDS
) -> Branched:
    """Round (rows, K) to int4 in groups, with a branch of `rank`; inputs are rounded by `rule`.

    Raises:
        ValueError: a weight or an input is not finite.
    """
    if not bool(torch.isfinite(inputs.sample).all()):
        raise ValueError("the layer's inputs are NaN or infinite")
    layer = _Layer(weight.float(), inputs, group, rank, rule)
    best = min((layer.start(strength) for strength in (None, *STRENGTHS)), key=lambda found: found.error)
    turns = 0
    for found in layer.turns(best, rounds):
        if found.error >= best.error:
            break
        best, turns = found, found.rounds
    compensated = layer.compensated(best)
    chosen = compensated if compensated.error < best.error else best
    return Branched(chosen.residual, chosen.smooth, chosen.up, chosen.down, best.strength, turns, chosen.error)


def nearest_error(weight: Tensor, inputs: LayerInputs, group: int, rule: ActivationRule) -> float:
    """The same error of rounding to nearest without smoothing and branch."""
    rounded = round_activations(inputs.sample, rule, {}, 0)
    exact = inputs.sample @ weight.float().T
    return _ratio(rounded @ dequantize(quantize(weight, 4, group)).T - exact, exact)


class _Layer:
    """One layer, its inputs and how it is rounded."""

    def __init__(self, weight: Tensor, inputs: LayerInputs, group: int, rank: int, rule: ActivationRule) -> None:
        self.weight, self.inputs, self.group, self.rule = weight, inputs, group, rule
        self.rank = min(rank, *weight.shape)
        self.exact = inputs.sample @ weight.T

    def start(self, strength: float | None) -> Branched:
        """s of `strength`, and the branch of the whole Ŵ."""
        smooth = self.smoothing(strength)
        smoothed = self.weight * smooth.float()
        return self.split(smoothed, smoothed, smooth, strength, 0)

    def smoothing(self, strength: float | None) -> Tensor:
        """s_k = max|X_k|^α / max|W_k|^(1 - α), scaled to have one in the middle of its range."""
        if strength is None:
            return torch.ones(self.weight.shape[1], dtype=torch.float16)
        inputs, weights = (_at_least(sizes) for sizes in (self.inputs.absmax, self.weight.abs().amax(0)))
        smooth = inputs**strength / weights ** (1 - strength)
        return (smooth / (smooth.max() * smooth.min()).sqrt()).clamp(2**-14, 65504).half()

    def split(self, smoothed: Tensor, target: Tensor, smooth: Tensor, strength: float | None, turn: int) -> Branched:
        """The branch is the leading part of `target`, and the residual what it leaves of Ŵ."""
        form = leading(target, self.rank)
        root = form.S.sqrt()
        up, down = (factor.to(_dtype(root)) for factor in (form.U * root, (form.V * root).T.contiguous()))
        residual = quantize(smoothed - up.float() @ down.float(), 4, self.group)
        return self.judged(residual, smooth, up, down, strength, turn)

    def turns(self, found: Branched, rounds: int) -> Iterator[Branched]:
        """The branch takes what rounding lost, the residual what the branch leaves, and again."""
        smoothed = self.weight * found.smooth.float()
        for turn in range(1, rounds + 1):
            lost = smoothed - dequantize(found.residual)
            found = self.split(smoothed, lost, found.smooth, found.strength, turn)
            yield found

    def compensated(self, found: Branched) -> Branched:
        """The residual rounded by GPTQ: its inputs are the smoothed ones."""
        smooth = found.smooth.float()
        exact = self.weight * smooth - found.up.float() @ found.down.float()
        gram = self.inputs.gram / torch.outer(smooth, smooth)
        residual = gptq(exact, gram, found.residual)
        return self.judged(residual, found.smooth, found.up, found.down, found.strength, found.rounds)

    def judged(
        self, residual: Packed, smooth: Tensor, up: Tensor, down: Tensor, strength: float | None, turn: int
    ) -> Branched:
        inner = self.inputs.sample / smooth.float()
        outputs = round_activations(inner, self.rule, {}, 0) @ dequantize(residual).T
        outputs += inner @ down.float().T @ up.float().T
        return Branched(residual, smooth, up, down, strength, turn, _ratio(outputs - self.exact, self.exact))


def _at_least(sizes: Tensor) -> Tensor:
    largest = float(sizes.max())
    return sizes.clamp_min(_TINY * largest) if largest else torch.ones_like(sizes)


def _dtype(root: Tensor) -> torch.dtype:
    """Of factors no entry of which is above `root`."""
    return torch.float16 if float(root.max()) < torch.finfo(torch.float16).max else torch.float32


def _ratio(difference: Tensor, exact: Tensor) -> float:
    signal = float(exact.double().square().sum())
    return float(difference.double().square().sum()) / signal if signal else 0.0
