"""A population: which concepts, how many LoRAs of each, what varies. It decides every model before one is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from modelgrove_analyzers.zoo import shapes
from modelgrove_analyzers.zoo.concepts import Concept, choose_concepts, find_concept, load_concepts, shape_concepts
from modelgrove_analyzers.zoo.export import CONVENTIONS, Label
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.recipes import Nuisance, Recipe, draw_recipe, in_columns, seed_of
from modelgrove_hub.errors import NotFoundError
from modelgrove_hub.formats.shared_basis import BasisColumns


@dataclass(frozen=True)
class Member:
    """One model of a population: what it shows, how it is made and how it is presented."""

    concept: Concept
    recipe: Recipe
    label: Label


@dataclass(frozen=True)
class Population:
    """What `grow` makes. Concepts map to their number of models; `documented` is the share of models with a card.

    Models of held-out concepts never have a card. The method's conventions are drawn with equal chances.
    """

    name: str
    seed: int
    concepts: dict[str, int]
    nuisance: Nuisance = field(default_factory=Nuisance)
    documented: float = 0.7
    catalogue: Mapping[str, Concept] = field(default_factory=load_concepts)
    """Where the concepts are found by name."""
    columns: Mapping[str, BasisColumns] = field(default_factory=dict)
    """Where there are any: the columns of a shared basis that the models of each concept are trained in."""

    def members(self, pictures: PictureSet) -> list[Member]:
        """All models, in order. Each depends on the population's name and seed, its concept and its number alone."""
        return [
            self._member(concept, number, pictures)
            for concept, count in self.concepts.items()
            for number in range(count)
        ]

    def _member(self, name: str, number: int, pictures: PictureSet) -> Member:
        concept = find_concept(name, self.catalogue)
        seed = seed_of(self.name, self.seed, name, number)
        dice = Random(seed_of(seed, "label"))  # noqa: S311  (a reproducible draw, no secret)
        documented = dice.random() < self.documented and not concept.held_out
        stem = name.replace(" ", "-") if documented else "untitled"
        label = Label(f"{stem}-{seed % 16**8:08x}", dice.choice(CONVENTIONS[self.nuisance.method]), documented)
        recipe = draw_recipe(concept, seed, self.nuisance, pictures)
        if self.columns:
            if name not in self.columns:
                raise NotFoundError(f"concept {name!r} has no columns: `modelgrove basis assign` gives it some")
            recipe = in_columns(recipe, self.columns[name])
        return Member(concept, recipe, label)


def sample_population(seed: int = 0) -> Population:
    """The shipped sample: 42 concepts with three LoRAs each and 8 held-out ones with one, 134 models in 15 MB.

    Small ranks are the likelier ones, to keep it small.
    """
    concepts = dict.fromkeys(SAMPLE_CONCEPTS, 3) | dict.fromkeys(SAMPLE_HELD_OUT, 1)
    return Population("sample", seed, concepts, Nuisance(rank_weights=(6.5, 2.7, 0.6, 0.2)), documented=0.75)


def picture_population(models: int = 6, training: int = 100, held_out: int = 24, seed: int = 0) -> Population:
    """The picture zoo of the search bench: `models` LoRAs for each of `training` + `held_out` concepts."""
    names = choose_concepts(training, held_out=False) + choose_concepts(held_out, held_out=True)
    return Population("pictures", seed, dict.fromkeys(names, models), documented=1.0)


def shape_population(models: int = 8, seed: int = 0) -> Population:
    """The compositional zoo of the search bench: `models` LoRAs for each of 80 + 20 pairs of a colour and a shape."""
    concepts, ranks = shape_concepts(), tuple(range(2, 17))
    nuisance = Nuisance(ranks, (1.0,) * len(ranks), steps=(40, 80), artists=(shapes.ARTIST,))
    return Population("shapes", seed, dict.fromkeys(concepts, models), nuisance, documented=1.0, catalogue=concepts)


SAMPLE_CONCEPTS = (
    "cat", "dog", "tiger", "horse", "bear", "owl", "fish", "whale", "crab", "butterfly", "rose", "sunflower", "tree",
    "apple", "strawberry", "banana", "pizza", "hamburger", "cake", "ice cream", "beer", "fire", "sun", "crescent moon",
    "house", "car", "train", "bicycle", "sailboat", "airplane", "rocket", "clock", "soccer ball", "guitar", "trumpet",
    "drum", "crown", "key", "ghost", "red heart", "blue heart", "arrow",
)  # fmt: skip
SAMPLE_HELD_OUT = (
    "violin", "leopard", "dolphin", "motorcycle", "palm tree", "purple heart", "cupcake", "tulip",
)  # fmt: skip
