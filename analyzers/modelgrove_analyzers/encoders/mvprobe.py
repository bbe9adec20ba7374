"""MVProbe: probes of four views of one layer's update, each response standardised.

MVProbe, ICML 2026, arXiv 2605.23410: the views of X (out × in) are X, Xᵀ, XXᵀ and XᵀX. Each has its own
probes Z and projection P, and each model's response to them has mean zero and variance one over all
its entries before it is projected,

    p_v = ReLU(Pᵀ standardise(view_v(X) Z)),    e = M (p_1, p_2, p_3, p_4) + b.

The loss is in `heads`, the layer is `closed_form.best_layer`. With 64 probes a view instead of 128
it is about as large as ProbeX. The paper's code takes 400 epochs at a learning rate of 3e-4, for ten times as
many models; here it is 200 at 1e-3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_analyzers.encoders.features import Shape, Updates
from modelgrove_analyzers.encoders.heads import Parameters, uniform
from modelgrove_analyzers.encoders.learning import Encoder, TrainedEmbedder, TrainedOptions
from modelgrove_analyzers.encoders.probes import responses
from modelgrove_hub.contracts import Params as BaseParams

if TYPE_CHECKING:
    from torch import Generator, Tensor


class MVProbeOptions(TrainedOptions):
    """How an expert is trained."""

    rank: int = Field(64, ge=1, le=1024, description="Probes of each view, and length of the encoding.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Of Adam.")


def views(updates: Updates) -> tuple[Updates, ...]:
    """X, Xᵀ, XXᵀ and XᵀX."""
    return updates, updates.T, updates.squared, updates.T.squared


def start(shape: Shape, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Probes Z and projection P of each view, started as ProbeX starts its own; M and b."""
    out, width = shape
    parameters = {}
    for number, (rows, columns) in enumerate(((out, width), (width, out), (out, out), (width, width))):
        parameters[f"Z.{number}"] = uniform((columns, rank), rank, generator)
        parameters[f"P.{number}"] = uniform((rows, rank), rows, generator)
    total = 4 * rank * rank
    parameters["M"] = uniform((rank, total), total, generator)
    parameters["b"] = uniform((rank,), total, generator)
    return parameters


def encode(parameters: Parameters, updates: Updates) -> Tensor:
    """e (n, r_T) of n models."""
    import torch

    heard = [
        responses(view, parameters[f"Z.{number}"], parameters[f"P.{number}"], standardise=True).relu().flatten(1)
        for number, view in enumerate(views(updates))
    ]
    encoded: Tensor = torch.cat(heard, 1) @ parameters["M"].T + parameters["b"]
    return encoded


class MVProbe(TrainedEmbedder):
    """ProbeX with four standardised views."""

    name: ClassVar[str] = "mvprobe"
    summary: ClassVar[str] = "Text search over LoRA weights: learned probes of X, Xᵀ, XXᵀ and XᵀX, standardised."
    paper: ClassVar[str] = "MVProbe, ICML 2026, arXiv 2605.23410"
    Params: ClassVar[type[BaseParams]] = MVProbeOptions
    encoder: ClassVar[Encoder] = Encoder(start, encode)
