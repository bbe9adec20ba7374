"""What a search answers: hits with their scores, and sentences about what it could not look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from modelgrove_hub.tables import Model

if TYPE_CHECKING:
    from modelgrove_hub.search.groups import Group

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
    looks_like: tuple[str, ...]
    """The words that its weights say, the best first; none where no expert has placed it."""
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
    """Groups of models that have no expert, by title, and how many of theirs cannot be found by weights."""
    not_embedded: Mapping[str, int]
    """Groups that have one, and how many of their models have no vector yet."""
    outside: Mapping[str, int] = field(default_factory=dict)
    """Families with adapters that fit none of the trees here, and how many."""


def hit(
    model: Model, scores: Mapping[Side, float], thresholds: Mapping[Side, float], found_by: Sequence[Side],
    looks_like: tuple[str, ...],
) -> Hit:  # fmt: skip
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
        looks_like=looks_like,
        kind=model.kind,
        family=model.family,
        adapter_type=model.adapter_type,
        base=model.declared_base,
        licence=model.licence,
        trust=model.trust,
        tags=tuple(model.tags),
    )


def answer(
    hits: Sequence[Hit], missing: Mapping[Group, int], with_expert: Sequence[Group], outside: Mapping[str, int]
) -> Answer:
    """Hits and what they leave out: `missing` models by group, some in groups `with_expert`; `outside` all trees."""
    without = {group: count for group, count in missing.items() if group not in with_expert}
    waiting = {group: count for group, count in missing.items() if group in with_expert}
    nothing = not any(found.sure for found in hits)
    notes = tuple(_notes(hits, nothing, without, waiting, outside))
    return Answer(tuple(hits), nothing, notes, _by_title(without), _by_title(waiting), outside)


def _by_title(counts: Mapping[Group, int]) -> dict[str, int]:
    return {group.title: count for group, count in counts.items()}


def _notes(
    hits: Sequence[Hit], nothing: bool, without: Mapping[Group, int], waiting: Mapping[Group, int],
    outside: Mapping[str, int],
) -> Iterator[str]:  # fmt: skip
    if nothing and hits:
        best = max(found.score for found in hits)
        yield f"Nothing here seems to do that: the best score, {best:.1f}, is one that any text may get."
    for group, count in without.items():
        command = f"modelgrove expert fit --tree {group.tree}"
        kinds = f"{group.kind}s"
        yield f"Tree {group.tree} has no expert, so its {count} {kinds} are not found by their weights: `{command}`."
    for group, count in waiting.items():
        yield f"{count} {group.kind}s of tree {group.tree} have no vector yet: `modelgrove expert embed`."
    for family, count in outside.items():
        yield f"{count} adapters of family {family} fit no known tree, so their weights say nothing: `modelgrove show`."
