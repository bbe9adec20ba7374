"""Verbs of search: by text and by likeness."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modelgrove_hub.hub import Hub
from modelgrove_hub.search.answers import Answer, By
from modelgrove_hub.search.filters import Filters
from modelgrove_hub.tables import Trust
from modelgrove_hub.verbs.verb import verb

Limit = Annotated[int, Field(ge=1, le=1000)]


@verb("GET", "/search")
def search(
    hub: Hub, *, text: Annotated[str, Field(description="What the model should do.", pattern=r"\S")], by: By = "both",
    kind: str | None = None, family: str | None = None, adapter_type: str | None = None, base: str | None = None,
    licence: str | None = None, rank: str | None = None, trust: Trust | None = None, limit: Limit = 10,
) -> Answer:  # fmt: skip
    """The models that do most nearly what the text says, by their weights, their cards or both.

    Raises:
        UsageError: the text is empty, or a filter's value is of no known form.
    """
    from modelgrove_hub.search.query import search as ask

    return ask(hub, text, by, Filters(kind, family, adapter_type, base, licence, rank, trust), limit)


@verb("GET", "/similar/{model:path}")
def similar(
    hub: Hub, *, model: str, kind: str | None = None, family: str | None = None, adapter_type: str | None = None,
    base: str | None = None, licence: str | None = None, rank: str | None = None, trust: Trust | None = None,
    limit: Limit = 10,
) -> Answer:  # fmt: skip
    """The models that do most nearly what this one does. Scores are cosines of their vectors.

    Raises:
        NotFoundError: there is no such model.
        UsageError: several are called so, or a filter's value is of no known form.
    """
    from modelgrove_hub.search.query import similar as ask

    return ask(hub, model, Filters(kind, family, adapter_type, base, licence, rank, trust), limit)
