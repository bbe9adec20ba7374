"""Say in words what an adapter does, from its weights and its base alone: no other adapter's card is needed.

`responses` tells which update each layer would need to answer with a word. An update X = ΔW is compared with
them on the inputs that matter, by the cosine of f = XZ − c with G(w)Z, where c is the mean of XZ over the
tree's adapters: what they all do is no word. Over the layers,

    s(X, w) = Σ_l a_l ⟨f_l/‖f_l‖, G_l(w)Z_l/‖G_l(w)Z_l‖⟩

in standard deviations over the words. The weight a_l of a layer is the square of how well its own s agrees with
the documented adapters, whose labels are like some words and unlike others: a dozen numbers is all that is
learned from labels, so it holds for what no label says. The place in text space is the mean of the words'
vectors, each weighing exp(s/τ).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelgrove_analyzers.encoders.responses import responses
from modelgrove_analyzers.encoders.training import unit

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_analyzers.encoders.denoiser import Denoiser
    from modelgrove_analyzers.encoders.features import Updates
    from modelgrove_analyzers.encoders.lesson import Lesson
    from modelgrove_analyzers.encoders.responses import Response

TEMPERATURE = 0.3
"""τ, in standard deviations."""
WIDTH = 256
"""Directions kept of what the words' responses span."""
_FAINT = 0.1
"""Share of the best layer's weight under which a layer is left out."""
_PREFIX = "naming."


@dataclass(frozen=True)
class NamedLayer:
    """One layer: Z (in, m), c (out·m), and the map (out·m, p) to where the words are."""

    inputs: Tensor
    centre: Tensor
    map: Tensor


@dataclass(frozen=True)
class Naming:
    """What naming needs, all float32: `words` (w, p) and their vectors `places` (w, d) in text space."""

    layers: Mapping[str, NamedLayer]
    words: Tensor
    places: Tensor

    def scores(self, updates: Mapping[str, Updates]) -> Tensor:
        """s (n, w) of n models, in standard deviations over the words."""
        import torch

        found = torch.stack([_shifted(updates[name], own) @ own.map for name, own in self.layers.items()])
        return _standard(found.sum(0) @ self.words.T)

    def place(self, updates: Mapping[str, Updates]) -> Tensor:
        """Vectors (n, d) of length one in text space; zero for a model that changes none of the layers."""
        import torch

        changed = torch.stack([updates[name].S.any(1) for name in self.layers]).any(0)
        placed: Tensor = unit((self.scores(updates) / TEMPERATURE).softmax(1) @ self.places)
        return placed * changed[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """What was learned, in half precision."""
        parts = {
            f"{part}.{name}": getattr(own, part)
            for name, own in self.layers.items()
            for part in ("inputs", "centre", "map")
        }
        return {_PREFIX + name: t.half() for name, t in {**parts, "words": self.words, "places": self.places}.items()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Naming | None:
        """The naming among an expert's tensors; None if it was fitted without one."""
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
        if not own:
            return None
        names = [name.removeprefix("inputs.") for name in own if name.startswith("inputs.")]
        layers = {n: NamedLayer(own[f"inputs.{n}"], own[f"centre.{n}"], own[f"map.{n}"]) for n in names}
        return cls(layers, own["words"], own["places"])


def learn_naming(denoiser: Denoiser, lesson: Lesson) -> Naming | None:
    """Ask the base for the lesson's words, and find the layers that tell; None when no layer of the adapters agrees."""
    import torch

    from modelgrove_hub.search.text import embed_texts

    answers = responses(
        denoiser, lesson.words, lesson.updates.keys(), lambda done: lesson.progress(done, "asking the base for words")
    )
    places = unit(torch.from_numpy(lesson.background.centre(embed_texts(lesson.words))))
    wanted = _standard(lesson.labels @ places.T)
    centres = {name: _moved(lesson.updates[name], answer.inputs).mean(0) for name, answer in answers.items()}
    agreement: dict[str, float] = {}
    spread: dict[str, float] = {}
    for name, answer in answers.items():
        layer = NamedLayer(answer.inputs, centres[name], torch.empty(0))
        own = _shifted(lesson.updates[name], layer) @ unit(answer.words).T
        agreement[name] = max(0.0, float((_standard(own) * wanted).mean()))
        spread[name] = max(float(own.std()), 1e-12)
    best = max(agreement.values(), default=0.0)
    weights = {name: (own / best) ** 2 / spread[name] for name, own in agreement.items() if own**2 > _FAINT * best**2}
    return _compressed({name: answers[name] for name in weights}, weights, centres, places) if weights else None


def _compressed(
    answers: Mapping[str, Response], weights: Mapping[str, float], centres: Mapping[str, Tensor], places: Tensor
) -> Naming:
    """Responses of all layers side by side, in their leading directions."""
    import torch

    wide = torch.cat([weights[name] * unit(answer.words) for name, answer in answers.items()], 1)
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    kept = slice(0, WIDTH)
    maps = Vh[kept].T.split([answer.words.shape[1] for answer in answers.values()])
    layers = {
        name: NamedLayer(answer.inputs, centres[name], part)
        for (name, answer), part in zip(answers.items(), maps, strict=True)
    }
    return Naming(layers, U[:, kept] * S[kept], places)


def _moved(updates: Updates, inputs: Tensor) -> Tensor:
    """XZ/‖X‖, (n, out·m), of n models; zero for a model without the layer."""
    norms = updates.S.norm(dim=1).clamp(min=1e-30)
    found: Tensor = (updates.U * (updates.S / norms[:, None])[:, None]) @ (updates.V.mT @ inputs)
    return found.flatten(1)


def _shifted(updates: Updates, layer: NamedLayer) -> Tensor:
    """f/‖f‖, (n, out·m); zero for a model without the layer."""
    there = updates.S.any(1)
    return unit(_moved(updates, layer.inputs) - layer.centre) * there[:, None]


def _standard(rows: Tensor) -> Tensor:
    """Rows of mean zero and variance one."""
    centred = rows - rows.mean(1, keepdim=True)
    found: Tensor = centred / centred.std(1, keepdim=True).clamp(min=1e-12)
    return found
