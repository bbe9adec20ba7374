"""The dense expert: a linear map of all entries of one layer's update.

The baseline of Horwitz et al., arXiv 2410.13569, section 4.1: e_k = Σ_ij W_ijk X_ij + b_k, with as many
numbers as out · in · r_T. Trained like ProbeX (`learning`). With X = UΣVᵀ the sum is Σ_r σ_r u_rᵀ W_k v_r, but
W has many more slices than a batch has models: this is the one encoder that forms X, a batch at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modelgrove_analyzers.encoders.features import Shape, Updates
from modelgrove_analyzers.encoders.heads import Parameters, uniform
from modelgrove_analyzers.encoders.learning import Encoder, TrainedEmbedder

if TYPE_CHECKING:
    from torch import Generator, Tensor


def start(shape: Shape, rank: int, generator: Generator) -> dict[str, Tensor]:
    """W (r_T, out·in) and b."""
    total = shape[0] * shape[1]
    return {"W": uniform((rank, total), total, generator), "b": uniform((rank,), total, generator)}


def encode(parameters: Parameters, updates: Updates) -> Tensor:
    """e (n, r_T) of n models."""
    X = (updates.U * updates.S[:, None]) @ updates.V.mT
    encoded: Tensor = X.flatten(1) @ parameters["W"].T + parameters["b"]
    return encoded


class Dense(TrainedEmbedder):
    """A baseline."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "Baseline for text search over LoRA weights: a linear map of one layer's whole update."
    paper: ClassVar[str] = "Horwitz et al., Learning on Model Weights using Tree Experts, arXiv 2410.13569"
    encoder: ClassVar[Encoder] = Encoder(start, encode)
