"""Attention probabilities on a logarithmic grid (Ryu et al., DGQ, ICLR 2025, arXiv 2501.04304).

Most probabilities of a caption's words are tiny, and a few decide what is painted: a grid of powers of two keeps both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_log2(values: Tensor, bits: int, largest: Tensor) -> Tensor:
    """δ · 2^-k for values in [0, δ], with k = round(-log2(value / δ)) in 0 … 2^bits - 1; `largest` is δ, broadcast.

    What is smaller than the grid, zero too, becomes its smallest step; at 5 bits and more that is 2^-31 δ or less.
    """
    delta = torch.where(largest > 0, largest, 1.0)
    exponent = (-(values / delta).log2()).round().clamp(0, 2**bits - 1)
    return torch.where(largest > 0, delta * torch.exp2(-exponent), 0.0)


def round_probabilities(probabilities: Tensor, bits: int, heads: int, start: bool) -> Tensor:
    """Of a cross-attention, (samples · heads, queries, keys): each sample, a prompt, has a δ of its own.

    With `start` those of the first key stay as they are: the text encoder's first token draws most of the attention,
    whatever the prompt, and would leave the steps near it unused by all others.
    """
    cut = probabilities.view(-1, heads, *probabilities.shape[1:])
    peak, rest = (cut[..., :1], cut[..., 1:]) if start else (cut[..., :0], cut)
    if not rest.shape[-1]:
        return probabilities
    rounded = round_log2(rest, bits, rest.amax((1, 2, 3), keepdim=True))
    return torch.cat([peak, rounded], -1).flatten(0, 1)
