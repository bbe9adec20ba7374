"""RegMean: the update whose outputs are nearest to every adapter's own, on that adapter's own inputs.

Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models (ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RIDGE = 1e-6
"""Share of the mean moment added to every input: those that nobody uses get the mean of the updates."""


def regress(rows: Sequence[Tensor], moments: Sequence[Tensor], shrink: float) -> list[Tensor]:
    """Rᵢ·Gᵢ·(Σ Gⱼ)⁻¹ for all i, with Rᵢ (kᵢ, n) an update or its `down` factor, and Gᵢ (n, n) its inputs' E[x xᵀ].

    Their products' weighted sum Δ = Σ wᵢΔᵢGᵢ(Σ Gⱼ)⁻¹ minimises Σ E‖(Δ − wᵢΔᵢ)xᵢ‖². Entries off the diagonal of each
    Gᵢ are multiplied by `shrink` first (the paper's α): few samples overrate how inputs go together.

    Raises:
        ValueError: a moment is not finite, or no adapter has any inputs but zero.
    """
    shrunk = [_shrunk(moment, shrink) for moment in moments]
    total = torch.stack(shrunk).sum(0)
    mean = float(total.diagonal().mean()) / len(shrunk)
    if not 0 < mean < float("inf"):
        raise ValueError("the inputs' second moments are zero or not finite")
    eye = torch.eye(len(total), dtype=total.dtype)
    factor, broken = torch.linalg.cholesky_ex(total + len(shrunk) * _RIDGE * mean * eye)
    if int(broken):
        raise ValueError("the inputs' second moments are no Gram matrices")
    answers = [R.double() @ (G + _RIDGE * mean * eye) for R, G in zip(rows, shrunk, strict=True)]
    solved = torch.cholesky_solve(torch.cat(answers).T, factor).T
    return list(torch.split(solved.to(rows[0].dtype), [len(R) for R in rows]))


def _shrunk(moment: Tensor, shrink: float) -> Tensor:
    G = moment.double()
    return shrink * G + (1 - shrink) * torch.diag(G.diagonal())
