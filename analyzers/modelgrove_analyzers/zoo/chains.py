"""Grow checkpoints with a known ancestry: full fine-tunes in chains and fans, merges, copies, a LoRA fused in.

Every node of a family is made from its parents alone and written as a diffusers UNet folder; the
truth about each (parents, relation, how it was made) goes to `truth.jsonl`.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from diffusers import UNet2DConditionModel

from modelgrove_analyzers.zoo.base import Progress, captions, to_pixels, v_loss
from modelgrove_analyzers.zoo.base_folder import ZooBase
from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.grow import read_truth, write_truth
from modelgrove_analyzers.zoo.loras import differences, train_loras
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.recipes import Nuisance, draw_recipe
from modelgrove_hub.search.text import token_states
from modelgrove_hub.tables import Relation

ROOT = "base"
"""How nodes name the base itself as a parent."""


class Node(Protocol):
    """One checkpoint of a family: its name, its parents, and how it comes from them."""

    relation: ClassVar[Relation]

    @property
    def name(self) -> str:
        """The folder that it is written to."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of nodes that come earlier in the family, or `ROOT`."""

    def make(self, parents: list[UNet2DConditionModel], base: ZooBase, pictures: PictureSet) -> UNet2DConditionModel:
        """The new model; the parents are left as they are."""


@dataclass(frozen=True)
class FineTune:
    """All weights trained for a few steps on the captioned pictures of some concepts (AdamW, constant rate)."""

    name: str
    parents: tuple[str]
    concepts: tuple[str, ...]
    seed: int
    steps: int = 30
    learning_rate: float = 2e-4
    batch: int = 16
    relation: ClassVar[Relation] = Relation.FINETUNE

    def make(self, parents: list[UNet2DConditionModel], base: ZooBase, pictures: PictureSet) -> UNet2DConditionModel:
        """Train a copy of the parent."""
        unet = copy.deepcopy(parents[0]).requires_grad_(True)
        rows = [row for name in self.concepts for row in find_concept(name).rows(pictures)]
        pixels = to_pixels(pictures.pixels[rows])
        texts = [captions(pictures.pictures[row])[2] for row in rows]
        states = token_states(texts)
        weights = list(unet.parameters())
        optimizer = torch.optim.AdamW(weights, self.learning_rate, weight_decay=0.01)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            chosen = torch.randint(len(rows), (self.batch,), generator=generator)
            loss = v_loss(unet, base.noise, base.codec.encode(pixels[chosen]), states[chosen], generator)
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
        return unet


@dataclass(frozen=True)
class Average:
    """A weighted mean of its parents' weights."""

    name: str
    parents: tuple[str, ...]
    weights: tuple[float, ...]
    relation: ClassVar[Relation] = Relation.MERGE

    def make(self, parents: list[UNet2DConditionModel], base: ZooBase, pictures: PictureSet) -> UNet2DConditionModel:  # noqa: ARG002
        """Average tensor by tensor, in float32."""
        unet, states = copy.deepcopy(parents[0]), [parent.float().state_dict() for parent in parents]
        mean = {
            name: sum(weight * state[name] for weight, state in zip(self.weights, states, strict=True))
            for name in states[0]
        }
        unet.load_state_dict(mean)
        return unet


@dataclass(frozen=True)
class HalfCopy:
    """Its parent in float16."""

    name: str
    parents: tuple[str]
    relation: ClassVar[Relation] = Relation.QUANTIZED

    def make(self, parents: list[UNet2DConditionModel], base: ZooBase, pictures: PictureSet) -> UNet2DConditionModel:  # noqa: ARG002
        """Round every tensor."""
        return copy.deepcopy(parents[0]).half()


@dataclass(frozen=True)
class ExactCopy:
    """Its parent under another name."""

    name: str
    parents: tuple[str]
    relation: ClassVar[Relation] = Relation.COPY

    def make(self, parents: list[UNet2DConditionModel], base: ZooBase, pictures: PictureSet) -> UNet2DConditionModel:  # noqa: ARG002
        """The same weights."""
        return parents[0]


@dataclass(frozen=True)
class Fused:
    """Its parent with a LoRA on one concept added to the weights."""

    name: str
    parents: tuple[str]
    concept: str
    seed: int
    nuisance: Nuisance = field(default_factory=Nuisance)
    relation: ClassVar[Relation] = Relation.FINETUNE

    def make(self, parents: list[UNet2DConditionModel], base: ZooBase, pictures: PictureSet) -> UNet2DConditionModel:
        """Train the LoRA on the parent, then W + α/r · B A."""
        unet = copy.deepcopy(parents[0])
        recipe = draw_recipe(find_concept(self.concept), self.seed, self.nuisance, pictures)
        (lora,) = train_loras(base._replace(unet=unet), pictures, [recipe])
        with torch.no_grad():
            for name, update in differences(unet, lora).items():
                unet.get_parameter(f"{name}.weight").add_(update)
        return unet


def sample_family(seed: int = 0) -> tuple[Node, ...]:
    """A family of twelve: a chain of three, siblings, cousins, two merges, two copies, a fused LoRA and its child."""
    return (
        FineTune("animals", (ROOT,), ("cat", "dog", "horse", "lion"), seed + 1),
        FineTune("animals-birds", ("animals",), ("owl", "eagle", "duck", "penguin"), seed + 2),
        FineTune("animals-birds-sea", ("animals-birds",), ("fish", "whale", "crab", "octopus"), seed + 3),
        FineTune("animals-plants", ("animals",), ("rose", "tree", "cactus", "sunflower"), seed + 4),
        FineTune("vehicles", (ROOT,), ("car", "train", "airplane", "ship"), seed + 5),
        FineTune("vehicles-music", ("vehicles",), ("guitar", "drum", "trumpet", "bell"), seed + 6),
        Average("animals-and-vehicles", ("animals", "vehicles"), (0.5, 0.5)),
        Average("birds-and-music", ("animals-birds", "vehicles-music"), (0.7, 0.3)),
        HalfCopy("vehicles-fp16", ("vehicles",)),
        ExactCopy("my-great-model", ("animals-plants",)),
        Fused("vehicles-with-crown", ("vehicles",), "crown", seed + 7),
        FineTune("crown-food", ("vehicles-with-crown",), ("pizza", "apple", "bread", "cheese"), seed + 8),
    )


def grow_family(
    family: Sequence[Node],
    base: ZooBase,
    pictures: PictureSet,
    out_folder: Path,
    progress: Progress = lambda _done, _message: None,
) -> list[dict[str, Any]]:
    """Write every node to `out_folder`/<name> and the truth to `truth.jsonl`; nodes already there are left alone."""
    out_folder.mkdir(parents=True, exist_ok=True)
    truth = read_truth(out_folder)
    for number, node in enumerate(family):
        if node.name not in truth or not (out_folder / node.name).is_dir():
            parents = [base.unet if name == ROOT else _load(out_folder / name) for name in node.parents]
            _save(node.make(parents, base, pictures), out_folder / node.name)
            truth[node.name] = {
                "name": node.name,
                "path": node.name,
                "parents": list(node.parents),
                "relation": node.relation.value,
                "made_by": type(node).__name__,
                "recipe": asdict(node),  # type: ignore[call-overload]  # every node is a dataclass; a protocol cannot say it
            }
            write_truth(out_folder, [truth[n.name] for n in family if n.name in truth])
        progress((number + 1) / len(family), node.name)
    return [truth[node.name] for node in family]


def _load(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()


def _save(unet: UNet2DConditionModel, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    unet.save_pretrained(partial)
    os.replace(partial, folder)
