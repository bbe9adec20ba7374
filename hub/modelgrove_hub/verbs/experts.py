"""Verbs of experts: what learns the weights of a tree, and the vectors that it gives to models."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from modelgrove_hub.hub import Hub
from modelgrove_hub.registry import routing
from modelgrove_hub.search import embedding
from modelgrove_hub.search.experts import newest_experts, training_inputs
from modelgrove_hub.search.groups import fits_none, groups
from modelgrove_hub.verbs.jobs import Work
from modelgrove_hub.verbs.verb import verb


class ExpertFacts(BaseModel):
    """A tree's adapters or networks, and their newest expert."""

    tree: str
    kind: str
    models: int
    not_embedded: int
    """Models that have no vector yet."""
    expert: str | None
    created_at: datetime | None
    metrics: dict[str, Any]
    calibration: dict[str, Any]


class Experts(BaseModel):
    """All trees, and adapters that fit none."""

    groups: list[ExpertFacts]
    outside: dict[str, int]
    """Families with adapters that fit no tree, and how many."""


class Fit(BaseModel):
    """An expert to fit."""

    tree: str
    kind: Literal["adapter", "checkpoint"] | None = None
    method: str = "gram-ridge"
    params: dict[str, Any] = Field(default_factory=dict, description="Fit the embedder's schema.")
    key: str | None = Field(None, max_length=200)


@verb("GET", "/experts")
def list_experts(hub: Hub) -> Experts:
    """Trees, their newest experts, and how many models wait for a vector."""
    with hub.reading() as session:
        counts, experts, missing = groups(session), newest_experts(session), embedding.not_embedded(session)
        outside = fits_none(session)
    found = [
        ExpertFacts(
            tree=group.tree, kind=group.kind, models=counts.get(group, 0), not_embedded=missing.get(group, 0),
            expert=f"{one.encoder} v{one.version}" if one else None, created_at=one.created_at if one else None,
            metrics=one.metrics if one else {},
            calibration={name: it for name, it in one.calibration.items() if name != "centre"} if one else {},
        )
        for group in sorted({*counts, *experts})
        for one in (experts.get(group),)
    ]  # fmt: skip
    return Experts(groups=found, outside=outside)


@verb("POST", "/experts/plan", "write")
def plan_fit(hub: Hub, *, fit: Fit) -> Work:
    """The work that fits an expert on the documented models of a tree: give it to `submit_job`.

    Raises:
        NotFoundError: the tree has no such models.
    """
    routing.route(hub)  # an expert must not learn from the models of two trees
    with hub.reading() as session:
        models = [f"@#{number}" for number in training_inputs(session, fit.tree, fit.kind)]
    return Work(plugin=f"embedder.{fit.method}", params=fit.params, models=models, target=fit.tree, key=fit.key)


@verb("POST", "/experts/embed", "write")
def embed(hub: Hub, *, tree: str | None = None) -> embedding.Embedded:
    """Place all models that have no vector yet, by weights and by card."""
    return embedding.embed_missing(hub, tree)


@verb("POST", "/experts/route", "write")
def route(hub: Hub, *, family: str | None = None) -> routing.Routed:
    """Decide again which tree every model belongs to, from its weights."""
    return routing.route(hub, family, again=True)
