"""How different two runs of a sampler look to the original denoiser itself: no other network is needed.

What a denoiser's middle answers to noisy pictures is known to describe their content (Baranchuk et al.,
arXiv 2112.03126), so its frozen features stand in for those of LPIPS (Zhang et al., arXiv 1801.03924) and FID (Heusel
et al., arXiv 1706.08500). Runs are compared step by step, on what the network was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modelgrove_hub.contracts import DenoiserCall
from modelgrove_kernels.calls import output_of


def features(network: nn.Module, calls: Sequence[DenoiserCall]) -> list[Tensor]:
    """What the middle of `network` answers to each call's inputs: (n, positions, channels), float32."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, answer: object) -> None:
        values = output_of(answer).float()
        found.append(values.flatten(2).mT if values.ndim == 4 else values)

    handle = middle_of(network).register_forward_hook(keep)
    try:
        with torch.inference_mode():
            for call in calls:
                network(*call.positional, **call.named)
    finally:
        handle.remove()
    return found


def middle_of(network: nn.Module) -> nn.Module:
    """The middle block of a UNet, else the middle one of the longest list of blocks."""
    middle = getattr(network, "mid_block", None)
    if isinstance(middle, nn.Module):
        return middle
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=lambda found: sum(weight.numel() for weight in found.parameters()), default=None)
    return network if not blocks else blocks[len(blocks) // 2]


def perceptual(originals: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """As LPIPS: features of unit length at each position, ‖f - f'‖², the mean over positions, pictures and steps.

    Zero is the same, 2 has nothing in common.
    """
    pairs = zip(originals, others, strict=True)
    distances = [(_unit(one) - _unit(other)).square().sum(-1).flatten() for one, other in pairs]
    return float(torch.cat(distances).mean())


def frechet(originals: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """‖μ - μ'‖² + tr(C + C' - 2 (C C')^½) over tr(C), of features averaged over positions, of all pictures and steps.

    A share of the originals' own variance. It counts what all pictures have in common, not which is which.
    """
    (mean, spread), (other_mean, other_spread) = (_moments(found) for found in (originals, others))
    # The eigenvalues of C C' are those of C^½ C' C^½, which are real and ≥ 0 but for rounding.
    roots = torch.linalg.eigvals(spread @ other_spread).real.clamp_min(0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + spread.trace() + other_spread.trace() - 2 * roots
    variance = float(spread.trace())
    return max(0.0, float(distance)) / variance if variance else 0.0


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


def _moments(found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows = torch.cat([values.mean(1) for values in found]).double()
    return rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])
