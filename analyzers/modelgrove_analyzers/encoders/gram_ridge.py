"""Place LoRAs in text space from their weights alone: kernel ridge on the Grams of their updates.

For the update X = B·A of one layer the output-side Gram XXᵀ says which outputs it moves; A is
mostly its random start, and XXᵀ does not change under (A, B) → (RA, BR⁻¹). With X = UΣVᵀ its square
root is (XXᵀ)^½ = UΣUᵀ = CCᵀ, C = UΣ^½, and two LoRAs are compared by
k(i, j) = Σ_l w_l ‖CᵢᵀCⱼ‖², the inner product of these roots, each of norm one, so that strength is no
cue. It is the root and not the Gram itself because the root hears weak directions better; only its
leading columns are kept.

Layer weights are half kernel alignment with the label vectors, half uniform. The prediction is
kernel ridge (`closed_form.fit_dual`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_analyzers.encoders.closed_form import COPY, fit_dual
from modelgrove_analyzers.encoders.embedder import LoraEmbedder, Options
from modelgrove_analyzers.encoders.expert_file import Saved
from modelgrove_analyzers.encoders.features import Shape, Updates
from modelgrove_analyzers.encoders.grams import crossed, mixed, roots
from modelgrove_analyzers.encoders.judge import Judge
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.training import unit
from modelgrove_hub.contracts import Params as BaseParams

if TYPE_CHECKING:
    from torch import Tensor


class GramOptions(Options):
    """How an expert is fitted."""

    columns: int = Field(4, ge=1, le=64, description="Directions kept of each layer's update.")


@dataclass(frozen=True)
class GramFitted:
    """What placing a model needs: n training models, vectors of d numbers, all float32."""

    shapes: Mapping[str, Shape]
    weights: Mapping[str, float]
    """By layer; they sum to one."""
    roots: Mapping[str, Tensor]
    """By layer, C of every training model: (n, out, columns)."""
    dual: Tensor
    """(n, d): a model's vector is its kernel values with the training models times this."""
    places: Tensor
    """(n, d): where each training model is put by the others."""

    def place(self, updates: Mapping[str, Updates]) -> Tensor:
        """Vectors (m, d) of length one for m models.

        A training model, or a copy of one, is placed by the others: its own label would be an echo.
        """
        import torch

        found = {layer: roots(updates[layer]) for layer in self.weights}
        kernel = mixed(self.weights, found, self.roots)
        # A model that lacks a layer can still be a copy of one in the layers that it has.
        most = sum(weight * found[layer].any((1, 2)) for layer, weight in self.weights.items())
        likeness, twin = kernel.max(dim=1)
        return torch.where((likeness > COPY * most)[:, None], unit(self.places[twin]), unit(kernel @ self.dual))

    def tensors(self) -> dict[str, Tensor]:
        """Half precision where it is exact enough: vectors move by less than 0.1 %."""
        import torch

        stored = {f"roots.{layer}": root.half() for layer, root in self.roots.items()}
        weights = torch.tensor(list(self.weights.values()))
        return {**stored, "weights": weights, "dual": self.dual, "places": self.places.half()}


class GramRidge(LoraEmbedder):
    """The default embedder plugin."""

    name: ClassVar[str] = "gram-ridge"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "Text search over LoRA weights: closed-form kernel ridge on the Grams of their updates."
    paper: ClassVar[str] = "after Horwitz et al., Learning on Model Weights using Tree Experts, arXiv 2410.13569"
    Params: ClassVar[type[BaseParams]] = GramOptions

    def learn(self, lesson: Lesson, params: GramOptions) -> tuple[GramFitted, Judge]:  # noqa: ARG002
        """Weigh the layers, then fit; `params` mattered when the lesson was read."""
        import torch

        from modelgrove_kernels.ridge import align

        found = {layer: roots(updates) for layer, updates in lesson.updates.items()}
        grams = torch.stack([crossed(root, root) for root in found.values()])
        weights = (align(grams, lesson.labels @ lesson.labels.T) + 1 / len(grams)).float()
        weights /= weights.sum()
        dual, judge = fit_dual((weights[:, None, None] * grams).sum(0), lesson)
        shapes = {layer: updates.shape for layer, updates in lesson.updates.items()}
        by_layer = dict(zip(found, weights.tolist(), strict=True))
        return GramFitted(shapes, by_layer, found, dual, judge.known.vectors), judge

    def restore(self, saved: Saved) -> GramFitted:
        """The expert from what was saved of it."""
        weights = dict(zip(saved.shapes, saved.tensors["weights"].tolist(), strict=True))
        found = {layer: saved.tensors[f"roots.{layer}"] for layer in saved.shapes}
        return GramFitted(saved.shapes, weights, found, saved.tensors["dual"], saved.tensors["places"])
