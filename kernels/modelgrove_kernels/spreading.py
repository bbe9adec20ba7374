"""Orthogonal transforms that spread a layer's outliers over its inputs: the adaptive rotation scheme of LRQ-DiT.

Yang et al. (arXiv 2508.03485, section 4.2) measure how large a layer's inputs X (B·N inputs of C channels) are,
J = ‖X‖_F / √(BNC) (equation 11). Below a threshold outliers are mild, and a Hadamard rotation spreads them; above it
few channels stand out, and a rotation made for them is taken: X · R̂₁ · P · R̂₂ (equation 12), which is that of DuQuant
(Lin et al., arXiv 2406.01721): P deals the channels out to the blocks, the largest first, there and back ("zigzag"),
and R̂ turns the largest channel of a block into equal parts, again and again; the turns with the least peak are kept.
The packed format has a permutation and one rotation after it, so R̂₁ is left out: P · R̂₂.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelgrove_kernels.calibration import LayerInputs

THRESHOLD = 1.0
"""Of J, as published."""
_STEPS = 64
"""Turns of the greedy rotation, at most."""
_SMALLEST, _LARGEST = 8, 128
"""Blocks of a Hadamard rotation."""


@dataclass(frozen=True)
class Spread:
    """How a layer's inputs are turned, in the words of the packed format."""

    rotation: str | None = None
    block: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)


def fluctuation(inputs: LayerInputs) -> float:
    """J (equation 11): the root mean square of a layer's inputs."""
    return float((inputs.gram.diagonal().double().sum() / max(1, inputs.count * len(inputs.absmax))).sqrt())


def adaptive(inputs: LayerInputs, block: int, generator: torch.Generator) -> Spread:
    """The rotation that J chooses (equation 12); `block` columns share one made for outliers.

    Where columns are not made of such blocks, the Hadamard rotation is taken.

    Raises:
        ValueError: an input is not finite.
    """
    if not bool(torch.isfinite(inputs.gram.diagonal()).all()):
        raise ValueError("the layer's inputs are NaN or infinite")
    columns = len(inputs.absmax)
    if fluctuation(inputs) < THRESHOLD or columns % block:
        return hadamard_spread(columns)
    permutation = zigzag(inputs.absmax, block)
    rotation = greedy(inputs.sample[:, permutation], block, generator)
    return Spread("stored", block, {"permutation": permutation.int(), "rotation": rotation.half()})


def hadamard_spread(columns: int) -> Spread:
    """Hadamard blocks as large as columns allow, up to 128; none where only blocks below 8 fit."""
    block = min(columns & -columns, _LARGEST)
    return Spread("hadamard", block) if block >= _SMALLEST else Spread()


def zigzag(sizes: Tensor, block: int) -> Tensor:
    """The order (K,) in which channels of these `sizes` (K,) fill the blocks, so that their sums are nearly equal."""
    dealt = sizes.argsort(descending=True, stable=True).view(block, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.flatten()


def greedy(inputs: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """Orthogonal (K / block, block, block) for `inputs` (n, K): of the turns tried, those with the least peak."""
    turned = inputs.view(len(inputs), -1, block).transpose(0, 1)
    total = torch.eye(block).expand(len(turned), -1, -1)
    best, least = total, turned.abs().amax((1, 2))
    for _ in range(_STEPS):
        turn = _spreading(turned.abs().amax(1).argmax(1), block, generator)
        turned, total = turned @ turn, total @ turn
        peak = turned.abs().amax((1, 2))
        best = torch.where((peak < least).view(-1, 1, 1), total, best)
        least = torch.minimum(peak, least)
    return best.contiguous()


def _spreading(channels: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """Orthogonal (n, block, block): the row of each of the `channels` (n,) has equal entries, the others are random."""
    ones = torch.full((block, 1), block**-0.5)
    random = torch.randn(block, block - 1, generator=generator)
    base = torch.linalg.qr(torch.cat([ones, random], 1)).Q.T
    order = torch.arange(block).repeat(len(channels), 1)
    order.scatter_(1, channels.unsqueeze(1), 0)
    order[:, 0] = channels
    spreading: Tensor = base[order]
    return spreading
