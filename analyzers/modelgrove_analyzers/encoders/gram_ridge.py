"""Place LoRAs in text space from their weights alone: kernel ridge on the Grams of their updates.

For the update X = B·A of one layer the output-side Gram XXᵀ says which outputs it moves; A is
mostly its random start, and XXᵀ does not change under (A, B) → (RA, BR⁻¹). With X = UΣVᵀ its square
root is (XXᵀ)^½ = UΣUᵀ = CCᵀ, C = UΣ^½, and two LoRAs are compared by
k(i, j) = Σ_l w_l ‖CᵢᵀCⱼ‖², the inner product of these roots, each of norm one, so that strength is no
cue. It is the root and not the Gram itself because the root hears weak directions better; only its
leading columns are kept.

Layer weights are half kernel alignment with the label vectors, half uniform. The prediction is
kernel ridge (`closed_form.fit_dual`).

Where the base is registered it is asked too: what it says in words of an update (`naming`) is added with the
share that finds left-out labels best. Ridge knows what cards have taught it, the base what no card says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_analyzers.encoders.classes import ClassJudge
from modelgrove_analyzers.encoders.closed_form import COPY, Said, blended, fit_dual
from modelgrove_analyzers.encoders.embedder import Options, WeightsEmbedder
from modelgrove_analyzers.encoders.expert_file import Saved
from modelgrove_analyzers.encoders.features import Shape, Updates
from modelgrove_analyzers.encoders.grams import crossed, mixed, roots
from modelgrove_analyzers.encoders.judge import Judge
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.naming import Naming, learn_naming
from modelgrove_analyzers.encoders.training import unit
from modelgrove_hub.contracts import Params as BaseParams
from modelgrove_hub.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


class GramOptions(Options):
    """How an expert is fitted."""

    columns: int = Field(4, ge=1, le=64, description="Directions kept of each layer's update.")
    ask: bool = Field(True, description="Ask the base, if registered, for words: 1,230 passes of its denoiser.")


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
    naming: Naming | None
    """What the base was asked, if there is one and it told something."""
    share: float
    """How much the base's words count beside ridge."""

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
        vectors = torch.where((likeness > COPY * most)[:, None], unit(self.places[twin]), unit(kernel @ self.dual))
        return blended(vectors, Said(self.naming.place(updates), self.share)) if self.naming else vectors

    def tensors(self) -> dict[str, Tensor]:
        """Half precision where it is exact enough: vectors move by less than 0.1 %."""
        import torch

        stored = {f"roots.{layer}": root.half() for layer, root in self.roots.items()}
        stored |= {"weights": torch.tensor(list(self.weights.values())), "share": torch.tensor(self.share)}
        said = self.naming.tensors() if self.naming else {}
        return {**stored, "dual": self.dual, "places": self.places.half(), **said}


class GramRidge(WeightsEmbedder):
    """The default embedder plugin."""

    name: ClassVar[str] = "gram-ridge"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "Text search over LoRA weights: closed-form kernel ridge on the Grams of their updates."
    paper: ClassVar[str] = "after Horwitz et al., Learning on Model Weights using Tree Experts, arXiv 2410.13569"
    Params: ClassVar[type[BaseParams]] = GramOptions

    def learn(self, lesson: Lesson, params: GramOptions) -> tuple[GramFitted, Judge | ClassJudge]:
        """Ask the base, weigh the layers, then fit."""
        import torch

        from modelgrove_kernels.ridge import align

        naming = _asked(lesson) if params.ask else None
        found = {layer: roots(updates) for layer, updates in lesson.updates.items()}
        grams = torch.stack([crossed(root, root) for root in found.values()])
        weights = (align(grams, lesson.labels @ lesson.labels.T) + 1 / len(grams)).float()
        weights /= weights.sum()
        kernel = (weights[:, None, None] * grams).sum(0)
        dual, judge = fit_dual(kernel, lesson, naming.place(lesson.updates) if naming else None)
        shapes = {layer: updates.shape for layer, updates in lesson.updates.items()}
        by_layer = dict(zip(found, weights.tolist(), strict=True))
        naming = naming if dual.share else None
        return GramFitted(shapes, by_layer, found, dual.coefficients, dual.places, naming, dual.share), judge

    def restore(self, saved: Saved) -> GramFitted:
        """The expert from what was saved of it."""
        weights = dict(zip(saved.shapes, saved.tensors["weights"].tolist(), strict=True))
        found = {layer: saved.tensors[f"roots.{layer}"] for layer in saved.shapes}
        dual, places, share = (saved.tensors[name] for name in ("dual", "places", "share"))
        return GramFitted(saved.shapes, weights, found, dual, places, Naming.restore(saved.tensors), float(share))


def _asked(lesson: Lesson) -> Naming | None:
    """What the lesson's base says in words, where it can be asked; the log tells which."""
    from modelgrove_analyzers.encoders.denoiser import open_denoiser

    if lesson.base is None:
        lesson.log("no base is registered that could be asked for words")
        return None
    try:
        naming = learn_naming(open_denoiser(lesson.base), lesson)
    except (DataError, UsageError) as error:
        lesson.log(f"the base cannot be asked for words: {error}")
        return None
    said = f"tell of them in {len(naming.layers)} layers" if naming else "tell nothing of them"
    lesson.log(f"{lesson.base.name} was asked for {len(lesson.words)} words, which {said}")
    return naming
