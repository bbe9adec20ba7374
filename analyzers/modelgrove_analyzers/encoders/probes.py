"""Learned probes of an update and of its products with itself: the common part of ProbeX and MVProbe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_analyzers.encoders.features import Updates


def responses(updates: Updates, probes: Tensor, projection: Tensor, *, standardise: bool) -> Tensor:
    """PᵀXz_l of n models for all probes Z = (z_1, …): (in, r_U), (out, r_V) → (n, r_U, r_V).

    With `standardise` the entries of each model's XZ have mean zero and variance one before they are
    projected. Both follow from X = UΣVᵀ without forming XZ: its sum is 1ᵀU(ΣVᵀZ)1, and because U has
    orthonormal columns its squares sum to ‖ΣVᵀZ‖².
    """
    right = updates.S[:, :, None] * (updates.V.mT @ probes)
    left = updates.U.mT @ projection
    found: Tensor = right.mT @ left
    if not standardise:
        return found
    count = updates.U.shape[1] * probes.shape[1]
    mean = (updates.U.sum(1) * right.sum(2)).sum(1) / count
    variance = right.square().sum((1, 2)) / count - mean.square()
    deviation = variance.clamp(min=1e-30).sqrt()
    standard: Tensor = (found - mean[:, None, None] * projection.sum(0)) / deviation[:, None, None]
    return standard
