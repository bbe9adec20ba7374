"""Fine-tune the base's smallest weights alone, as SaRA does (Hu et al., ICLR 2025, arXiv 2409.06633).

    places      weights of the network whose magnitude is below one threshold for all layers (section 3.2)
    penalty     λ‖W ∘ mask‖_* of one matrix a step, drawn at random: what is learned stays of low rank (section 3.3)
    progress    at half of the steps weights that have grown beyond the threshold are left as they are, and the others
                go on with a fresh optimizer (section 3.4)
    gradients   are gathered at the places while they go back, so that they and Adam's moments are of that size
                (section 3.5)

Each is trained by itself, unlike the adapters of `loras`, which share the base's forward pass: no part of it is common
to two of them. Whatever a layer is, its weight and its bias count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from modelgrove_analyzers.zoo.base import Progress, v_errors
from modelgrove_analyzers.zoo.base_folder import ZooBase
from modelgrove_analyzers.zoo.loras import BETAS, EPSILON, Feed, learning_rate, measure
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.recipes import Recipe
from modelgrove_hub.formats.sara import Origin, SparseWriter, origin_of
from modelgrove_hub.search.text import token_states
from modelgrove_hub.store.writer import SafetensorsWriter
from modelgrove_kernels.sparse import Entries, threshold_of

SHARE = 0.2
"""Of the base's weights, the smallest, that are trained."""
PENALTY = 5e-4
"""λ, as in the authors' example."""
NARROWEST = 64
"""Matrices of which a side is not longer have no penalty, as in the authors' code."""
RATES = (1e-3, 4e-3)
"""Lowest and highest learning rate that a population draws from, instead of those of LoRAs."""


@dataclass(frozen=True)
class Sara:
    """A sparse adapter: by the UNet's name of a parameter, the places (k,) that were trained and what is added there.

    `origins` tell the parameters as they were. The losses are those of a `loras.Lora`.
    """

    recipe: Recipe
    threshold: float
    changes: dict[str, Entries]
    origins: dict[str, Origin]
    first_loss: float
    last_loss: float


def train_sara(
    base: ZooBase, pictures: PictureSet, recipe: Recipe, share: float = SHARE,
    progress: Progress = lambda _done, _message: None,
) -> Sara:  # fmt: skip
    """Train the `share` of the base's weights that are smallest. The base is left as it was."""
    origins = {name: p.detach() for name, p in base.unet.named_parameters() if name.endswith((".weight", ".bias"))}
    threshold = threshold_of(origins.values(), share)
    places = {name: small(weight, threshold) for name, weight in origins.items()}
    tuning = Tuning(origins, places)
    feed, states = Feed(base, pictures, recipe), token_states([recipe.prompt])
    dice = torch.Generator().manual_seed(recipe.seed + 2)
    first = measure(base, pictures, [recipe], states)
    for step in range(recipe.steps):
        if step == recipe.steps // 2:
            tuning = tuning.narrowed(threshold)
        latents, times, epsilon = feed.draw()
        weights = tuning.weights()
        errors = v_errors(
            _with(base, weights), base.noise, latents, states.expand(len(latents), -1, -1), times, epsilon
        )
        tuning.step(errors.mean() + PENALTY * tuning.nuclear_norm(dice), learning_rate(recipe, step))
        progress((step + 1) / recipe.steps, f"step {step + 1}")
    weights = {name: weight.detach() for name, weight in tuning.weights().items()}
    with torch.no_grad():
        last = measure(base._replace(unet=_with(base, weights)), pictures, [recipe], states)
    changes = {name: (own, (weights[name] - origins[name]).flatten()[own]) for name, own in places.items() if len(own)}
    described = {name: origin_of(weight) for name, weight in origins.items() if name in changes}
    return Sara(recipe, threshold, changes, described, first[0], last[0])


def _with(base: ZooBase, weights: Mapping[str, Tensor]) -> Any:
    """The UNet as a function, with these weights."""
    return lambda *inputs: functional_call(base.unet, dict(weights), inputs)


def small(weight: Tensor, threshold: float) -> Tensor:
    """Places (k,), rising, of the weights whose magnitude is below the threshold."""
    return (weight.abs() < threshold).flatten().nonzero().flatten()


class Tuning:
    """Weights that stay but for some places, where `values` are added, which Adam changes."""

    def __init__(self, frozen: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
        self.frozen, self.places = frozen, places
        self.values = {name: torch.zeros(len(own), requires_grad=True) for name, own in places.items() if len(own)}
        self.optimizer = torch.optim.Adam(self.values.values(), betas=BETAS, eps=EPSILON)
        self.matrices = [name for name in self.values if frozen[name].ndim == 2 and min(frozen[name].shape) > NARROWEST]

    def weights(self) -> dict[str, Tensor]:
        """All weights as they are now; the gradient of each is gathered at its places."""
        return {
            name: _added(weight, self.places[name], self.values[name]) if name in self.values else weight
            for name, weight in self.frozen.items()
        }

    def nuclear_norm(self, dice: torch.Generator) -> Tensor:
        """‖W ∘ mask‖_* of one of the matrices; 0 without any."""
        if not self.matrices:
            return torch.zeros(())
        name = self.matrices[int(torch.randint(len(self.matrices), (1,), generator=dice))]
        own, weight = self.places[name], self.frozen[name]
        masked = _added(torch.zeros_like(weight), own, weight.flatten()[own] + self.values[name])
        norm: Tensor = torch.linalg.matrix_norm(masked, "nuc")
        return norm

    def step(self, loss: Tensor, rate: float) -> None:
        """One step of Adam."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def narrowed(self, threshold: float) -> Tuning:
        """What has grown beyond the threshold stays; the other places go on."""
        weights = {name: weight.detach() for name, weight in self.weights().items()}
        places = {name: own[weights[name].flatten()[own].abs() < threshold] for name, own in self.places.items()}
        return Tuning(weights, places)


def _added(weight: Tensor, places: Tensor, values: Tensor) -> Tensor:
    return weight.flatten().index_add(0, places, values).view_as(weight)


def write_changes(sara: Sara, path: Path) -> None:
    """Write the adapter to `path`, float16, as formats/sara.py reads it."""
    with SafetensorsWriter(path, {"format": "pt"}) as file:
        writer = SparseWriter(file, sara.threshold)
        for name, (places, values) in sara.changes.items():
            half = values.half()
            changed = half != 0
            if bool(changed.any()):
                writer.add(f"unet.{name}", places[changed], half[changed], sara.origins[name])
        writer.close()
