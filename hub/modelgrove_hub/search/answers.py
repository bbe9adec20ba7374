"""What a search answers: hits with their scores, and sentences about what it could not look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modelgrove_hub.tables import Model

Side = Literal["weights", "card"]
By = Literal["weights", "card", "both"]
SIDES: Mapping[By, tuple[Side, ...]] = {"weights": ("weights",), "card": ("card",), "both": ("weights", "card")}


@dataclass(frozen=True)
class Hit:
    """A model found. `weights` and `card` are its scores by each side that was asked, None where it has none."""

    name: str
    score: float
    """The score by the side that speaks for it most."""
    found_by: By
    sure: bool
    """Whether that score passes its side's threshold; below it, texts that fit nothing here score as well."""
    weights: float | None
    card: float | None
    kind: str
    family: str
    adapter_type: str | None
    base: str | None
    licence: str | None
    trust: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """Hits, best first, and what the answer does not cover."""

    hits: tuple[Hit, ...]
    nothing: bool
    """No hit is sure."""
    notes: tuple[str, ...]
    """Sentences for people: whether there is nothing of the kind here, and what was not looked at."""
    without_expert: Mapping[str, int]
    """Trees that have no expert, and how many adapters of theirs cannot be found by weights."""
    not_embedded: Mapping[str, int]
    """Trees that have one, and how many of their adapters have no vector yet."""


def hit(model: Model, scores: Mapping[Side, float], thresholds: Mapping[Side, float], found_by: Sequence[Side]) -> Hit:
    """The facts of a model that was found. `found_by` are the sides that had it among their first."""
    # How far each score is above its own threshold makes the sides comparable.
    best = max(scores, key=lambda side: scores[side] - thresholds[side])
    return Hit(
        name=model.name,
        score=scores[best],
        found_by="both" if len(found_by) > 1 else found_by[0] if found_by else best,
        sure=scores[best] >= thresholds[best],
        weights=scores.get("weights"),
        card=scores.get("card"),
        kind=model.kind,
        family=model.family,
        adapter_type=model.adapter_type,
        base=model.declared_base,
        licence=model.licence,
        trust=model.trust,
        tags=tuple(model.tags),
    )


def answer(hits: Sequence[Hit], missing: Mapping[str, int], with_expert: Sequence[str]) -> Answer:
    """Hits and what they leave out: `missing` adapters by tree, some of them in trees `with_expert`."""
    without = {tree: count for tree, count in missing.items() if tree not in with_expert}
    waiting = {tree: count for tree, count in missing.items() if tree in with_expert}
    nothing = not any(found.sure for found in hits)
    return Answer(tuple(hits), nothing, tuple(_notes(hits, nothing, without, waiting)), without, waiting)


def _notes(hits: Sequence[Hit], nothing: bool, without: Mapping[str, int], waiting: Mapping[str, int]) -> Iterator[str]:
    if nothing and hits:
        best = max(found.score for found in hits)
        yield f"Nothing here seems to do that: the best score, {best:.1f}, is one that any text may get."
    for tree, count in without.items():
        command = f"modelgrove expert fit --tree {tree}"
        yield f"Tree {tree} has no expert, so its {count} adapters are not found by their weights: `{command}`."
    for tree, count in waiting.items():
        yield f"{count} adapters of tree {tree} have no vector yet: `modelgrove expert embed`."
