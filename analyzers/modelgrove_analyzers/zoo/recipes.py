"""Everything that decides one LoRA of the zoo, and how it is drawn: the concept, and the nuisance around it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

from modelgrove_analyzers.zoo.concepts import Concept
from modelgrove_analyzers.zoo.pictures import ARTISTS, PictureSet
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.shared_basis import BasisColumns

PROMPT = "a picture of sks"
"""What every LoRA is trained with: the concept's name is never told."""


class Method(StrEnum):
    """How an adapter changes a layer (`methods`), or which weights of it (`sara`)."""

    LORA = "lora"
    LOHA = "loha"
    DORA = "dora"
    ORTHOGONAL = "orthogonal"
    SARA = "sara"


@dataclass(frozen=True)
class Recipe:
    """One LoRA: which pictures it sees and how it is trained. `pictures` are rows of the picture set.

    An orthogonal one has `columns` of a shared basis, as many as its rank. To a sparse one rank and alpha mean nothing.
    """

    concept: str
    seed: int
    rank: int
    alpha: float
    learning_rate: float
    steps: int
    pictures: tuple[int, ...]
    artists: tuple[str, ...]
    batch: int = 4
    prompt: str = PROMPT
    method: Method = Method.LORA
    columns: BasisColumns | None = None

    @property
    def scale(self) -> float:
        """What B·A is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Nuisance:
    """The ranges that recipes are drawn from. Learning rates are log-uniform, ranks have weights."""

    ranks: tuple[int, ...] = (2, 4, 8, 16)
    rank_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    alpha_per_rank: tuple[float, ...] = (0.5, 1.0, 2.0)
    learning_rate: tuple[float, float] = (3e-3, 1e-2)
    steps: tuple[int, int] = (80, 160)
    batch: int = 4
    artists: tuple[str, ...] = tuple(ARTISTS)
    most_pictures: int = 12
    method: Method = Method.LORA


def draw_recipe(concept: Concept, seed: int, nuisance: Nuisance, pictures: PictureSet) -> Recipe:
    """The recipe that `seed` gives for `concept`.

    Two artists or more are kept most of the time, and two pictures or more wherever there are two.

    Raises:
        UsageError: none of the nuisance's artists drew the concept.
    """
    dice = Random(seed)  # noqa: S311  (a reproducible draw, no secret)
    rows = {row: pictures.pictures[row].artist for row in concept.rows(pictures, nuisance.artists)}
    there = [artist for artist in nuisance.artists if artist in rows.values()]
    if not there:
        raise UsageError(f"concept {concept.name!r} has no drawing by {', '.join(nuisance.artists)}")
    count = dice.choices(range(1, len(there) + 1), weights=[1, 3, 4][: len(there)])[0]
    artists = dice.sample(there, count)
    usable = [row for row, artist in rows.items() if artist in artists]
    most = min(len(usable), nuisance.most_pictures)
    chosen = dice.sample(usable, dice.randint(min(2, most), most))
    rank = dice.choices(nuisance.ranks, weights=nuisance.rank_weights)[0]
    low, high = map(math.log, nuisance.learning_rate)
    return Recipe(
        concept=concept.name,
        seed=seed,
        rank=rank,
        alpha=rank * dice.choice(nuisance.alpha_per_rank),
        learning_rate=float(f"{math.exp(dice.uniform(low, high)):.3e}"),
        steps=dice.randint(*nuisance.steps),
        pictures=tuple(sorted(chosen)),
        artists=tuple(sorted({rows[row] for row in chosen})),
        batch=nuisance.batch,
        method=nuisance.method,
    )


def in_columns(recipe: Recipe, columns: BasisColumns) -> Recipe:
    """The same recipe for training in `columns`: their rank, and alpha so that the scale stays."""
    return replace(
        recipe, method=Method.ORTHOGONAL, columns=columns, rank=columns.rank, alpha=recipe.scale * columns.rank
    )


def seed_of(*parts: object) -> int:
    """A seed of 48 bits that depends on `parts` alone (not on Python's hash seed)."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")
