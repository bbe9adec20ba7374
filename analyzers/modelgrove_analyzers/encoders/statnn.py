"""StatNN: seven statistics of every layer, and ridge from them onto the text space.

Unterthiner, Keysers, Gelly, Bousquet & Tolstikhin, Predicting Neural Network Accuracy from Weights,
arXiv 2002.11448, section 3.2: mean, variance and the 0, 25, 50, 75 and 100 % quantiles of the weights of
each layer. Of an update X = UΣVᵀ the mean is 1ᵀUΣVᵀ1 / (out·in) and the mean square ‖Σ‖² / (out·in), both
exact; quantiles are those of 4,096 entries at fixed random places, the same for all models, so that X is
not formed. All have mean zero and variance one over the training models; prediction by
`closed_form.fit_dual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from modelgrove_analyzers.encoders.classes import ClassJudge
from modelgrove_analyzers.encoders.closed_form import fit_dual
from modelgrove_analyzers.encoders.embedder import Options, WeightsEmbedder
from modelgrove_analyzers.encoders.expert_file import Saved
from modelgrove_analyzers.encoders.features import Shape, Updates
from modelgrove_analyzers.encoders.judge import Judge
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.training import unit

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED = 4096
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def statistics(updates: Updates) -> Tensor:
    """(n, 7) for one layer of n models; zero for a model that lacks it."""
    import torch

    out, width = updates.shape
    mean = (updates.U.sum(1) * updates.S * updates.V.sum(1)).sum(1, keepdim=True) / (out * width)
    variance = updates.S.square().sum(1, keepdim=True) / (out * width) - mean.square()
    places = torch.Generator().manual_seed(0)
    rows = torch.randint(out, (SAMPLED,), generator=places)
    columns = torch.randint(width, (SAMPLED,), generator=places)
    entries = torch.stack(
        [(u[rows] * s * v[columns]).sum(1) for u, s, v in zip(updates.U, updates.S, updates.V, strict=True)]
    )
    quantiles = torch.quantile(entries, torch.tensor(QUANTILES), dim=1).T
    return torch.cat([mean, variance, quantiles], 1)


@dataclass(frozen=True)
class StatFitted:
    """A linear map (7·layers, d) of standardised statistics."""

    shapes: Mapping[str, Shape]
    mean: Tensor
    deviation: Tensor
    linear: Tensor

    def place(self, updates: Mapping[str, Updates]) -> Tensor:
        """Vectors (m, d) of length one for m models."""
        import torch

        found = torch.cat([statistics(updates[layer]) for layer in self.shapes], 1)
        return unit((found - self.mean) / self.deviation @ self.linear)

    def tensors(self) -> dict[str, Tensor]:
        """All that was learned."""
        return {"mean": self.mean, "deviation": self.deviation, "linear": self.linear}


class StatNN(WeightsEmbedder):
    """A baseline."""

    name: ClassVar[str] = "statnn"
    summary: ClassVar[str] = "Baseline for text search over LoRA weights: seven statistics of every layer, and ridge."
    paper: ClassVar[str] = "Unterthiner et al., Predicting Neural Network Accuracy from Weights, arXiv 2002.11448"

    def learn(self, lesson: Lesson, params: Options) -> tuple[StatFitted, Judge | ClassJudge]:  # noqa: ARG002
        """Ridge in its dual form, as there are more statistics than models."""
        import torch

        found = torch.cat([statistics(updates) for updates in lesson.updates.values()], 1)
        mean, deviation = found.mean(0), found.std(0).clamp(min=1e-30)
        rows = (found - mean) / deviation / found.shape[1] ** 0.5
        dual, judge = fit_dual(rows @ rows.T, lesson)
        linear = rows.T @ dual.coefficients / found.shape[1] ** 0.5
        shapes = {layer: updates.shape for layer, updates in lesson.updates.items()}
        return StatFitted(shapes, mean, deviation, linear), judge

    def restore(self, saved: Saved) -> StatFitted:
        """The expert from what was saved of it."""
        kept = saved.tensors
        return StatFitted(saved.shapes, kept["mean"], kept["deviation"], kept["linear"])
