"""What pruning methods share: their parameter, and a matrix of which some weights are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modelgrove_plugins.compress.packed import Stored, describe, matrix_of

if TYPE_CHECKING:
    from torch import Tensor

SPARSITY: Any = Field(0.3, gt=0, lt=1, description="Share of each layer's weights that become zero.")


def keep(values: Tensor, mask: Tensor, remarks: Mapping[str, Any] | None = None) -> Stored:
    """`values` of two or more dimensions in layout `sparse`, where its packed matrix has `mask` (rows, columns).

    Raises:
        ValueError: a value is not finite.
    """
    import torch

    from modelgrove_kernels.layouts import sparse_parts

    if not bool(torch.isfinite(values).all()):
        raise ValueError("NaN or infinite values cannot be pruned")
    matrix = matrix_of(values) * mask
    parts = sparse_parts(matrix, values.dtype)
    stored = describe(
        values, parts, layout="sparse", bits=1, group=max(1, matrix.shape[1]), nonzero=len(parts["values"])
    )
    share = 1 - len(parts["values"]) / matrix.numel()
    return Stored(stored.entry, parts, {"sparsity": round(share, 4), **(remarks or {})})


def largest(scores: Tensor, sparsity: float) -> Tensor:
    """Which of `scores` (rows, n) are kept: in each row all but the `sparsity` share that is smallest."""
    import torch

    dropped = torch.argsort(scores, dim=1, stable=True)[:, : int(sparsity * scores.shape[1])]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, dropped, False)
