"""LoRAs compared by which outputs they move: inner products of the square roots of XXᵀ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_analyzers.encoders.features import Updates


def roots(updates: Updates) -> Tensor:
    """C (n, out, k) with CCᵀ = (XXᵀ)^½ / ‖(XXᵀ)^½‖, as (XXᵀ)^½ = UΣUᵀ; zero for a model without the layer."""
    norms = updates.S.norm(dim=1, keepdim=True).clamp(min=1e-30)
    found: Tensor = updates.U * (updates.S / norms).sqrt()[:, None]
    return found


def crossed(rows: Tensor, columns: Tensor) -> Tensor:
    """‖CᵢᵀCⱼ‖² = ⟨CᵢCᵢᵀ, CⱼCⱼᵀ⟩ for all pairs: (n, out, k), (m, out, l) → (n, m)."""
    (n, out, k), (m, _, width) = rows.shape, columns.shape
    flat = rows.transpose(1, 2).reshape(n * k, out) @ columns.transpose(0, 1).reshape(out, -1)
    return flat.square().view(n, k, m, width).sum((1, 3))


def mixed(weights: Mapping[str, float], rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Tensor:
    """The kernel (n, m): the weighted sum over the layers in `weights`."""
    import torch

    return torch.stack([weight * crossed(rows[layer], columns[layer]) for layer, weight in weights.items()]).sum(0)
