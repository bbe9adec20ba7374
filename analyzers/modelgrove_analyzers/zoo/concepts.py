"""What the zoo's models can show: concepts, and the drawings that show them.

The list of real pictures is data (`data/concepts.toml`): a name that a person would type, a sentence
as a model card would have it, and the labels of the drawings. Drawn shapes follow a rule. Held-out
concepts are for testing: no expert may be fitted on their models.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modelgrove_analyzers.zoo import shapes
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_hub.errors import NotFoundError

CONCEPTS = Path(__file__).parent / "data/concepts.toml"


@dataclass(frozen=True)
class Concept:
    """One thing that a model can show. `text` completes "it draws …", `labels` are those of the pictures."""

    name: str
    group: str
    text: str
    labels: tuple[str, ...]
    held_out: bool = False

    def rows(self, pictures: PictureSet, artists: Sequence[str] = ()) -> list[int]:
        """The rows of `pictures` that show the concept, drawn by one of `artists` (all when empty)."""
        wanted = frozenset(self.labels)
        return [
            row
            for row, picture in enumerate(pictures.pictures)
            if picture.label in wanted and (not artists or picture.artist in artists)
        ]


@cache
def load_concepts() -> dict[str, Concept]:
    """All concepts of the real pictures by name, in the order of the file."""
    groups = tomllib.loads(CONCEPTS.read_text("utf-8"))
    return {
        name: Concept(name, group, row["text"], tuple(row["labels"]), row.get("held_out", False))
        for group, rows in groups.items()
        for name, row in rows.items()
    }


@cache
def shape_concepts() -> dict[str, Concept]:
    """The drawn concepts by name, "red star" and so on. Some names are those of real pictures too."""
    return {
        f"{colour} {shape}": Concept(
            f"{colour} {shape}", "shapes", f"a {shape} filled with {colour}", (shapes.label(colour, shape),), held_out
        )
        for colour, shape, held_out in shapes.pairs()
    }


def find_concept(name: str, catalogue: Mapping[str, Concept] | None = None) -> Concept:
    """The concept called `name` in `catalogue`, which is `load_concepts` when left out.

    Raises:
        NotFoundError: there is none; the message names the nearest ones.
    """
    concepts = load_concepts() if catalogue is None else catalogue
    if name not in concepts:
        near = ", ".join(difflib.get_close_matches(name, concepts, n=3)) or f"see {CONCEPTS}"
        raise NotFoundError(f"no concept {name!r} among {len(concepts)}: {near}")
    return concepts[name]


def choose_concepts(count: int, *, held_out: bool) -> tuple[str, ...]:
    """`count` concepts spread evenly over the groups (the first of each group, then the second, …).

    Raises:
        NotFoundError: there are fewer than `count`.
    """
    groups: dict[str, list[str]] = {}
    for concept in load_concepts().values():
        if concept.held_out is held_out:
            groups.setdefault(concept.group, []).append(concept.name)
    longest = max(map(len, groups.values()))
    turns = [names[i] for i in range(longest) for names in groups.values() if i < len(names)]
    if count > len(turns):
        raise NotFoundError(f"{count} concepts wanted with held_out={held_out}, there are {len(turns)}")
    return tuple(turns[:count])
