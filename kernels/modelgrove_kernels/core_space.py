"""Updates of one layer in the coordinates of their joint bases, where everything additive is small.

Xᵢ = left · Cᵢ · rightᵀ for all i, with orthonormal columns in `left` (m, k) and `right` (n, l), k and l at most the
summed ranks (Panariello et al., Core Space Merging, NeurIPS 2025). Sums, norms, inner products and singular values of
the Cᵢ are those of the Xᵢ, so a method that is defined by them gives in the core exactly what it gives on the full
matrices. One that looks at single entries gives another result there: entries of Cᵢ are strengths of directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelgrove_kernels.lowrank import Canonical, LowRank, decompose, stack


@dataclass(frozen=True)
class Frame:
    """Joint bases of updates of shape (m, n). None stands for the identity: that side keeps its own coordinates."""

    left: Tensor | None = None
    right: Tensor | None = None

    def lift(self, inner: Tensor) -> Tensor:
        """left · C · rightᵀ, the full matrix of a C in these coordinates."""
        rows = inner if self.left is None else self.left @ inner
        return rows if self.right is None else rows @ self.right.T

    def decompose(self, inner: Tensor) -> Canonical:
        """The singular value decomposition of `lift(inner)`, which is not formed.

        Raises:
            ValueError: a value is not finite.
        """
        return decompose(self.left, inner, self.right)


def core_of(updates: Sequence[LowRank], *, inputs: bool = True) -> tuple[Frame, tuple[LowRank, ...]]:
    """The joint frame, and the updates in it, factored as they came. Without `inputs` the right side stays as it is.

    Raises:
        ValueError: the updates have different shapes.
    """
    if len({update.shape for update in updates}) > 1:
        raise ValueError(f"updates of different shapes have no joint bases: {[update.shape for update in updates]}")
    whole = stack(updates, [1.0] * len(updates))
    left, ups = torch.linalg.qr(whole.up)
    right, downs = torch.linalg.qr(whole.down.T) if inputs else (None, whole.down.T)
    ranks = [update.rank for update in updates]
    pairs = zip(torch.split(ups, ranks, dim=1), torch.split(downs, ranks, dim=1), strict=True)
    return Frame(left, right), tuple(LowRank(up, down.T) for up, down in pairs)
