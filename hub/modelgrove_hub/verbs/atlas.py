"""Verb of the atlas: a map on which models that do alike lie near each other."""

from __future__ import annotations

from modelgrove_hub.hub import Hub
from modelgrove_hub.search.atlas import Atlas, read_atlas
from modelgrove_hub.verbs.verb import verb


@verb("GET", "/atlas")
def atlas(hub: Hub) -> Atlas:
    """The map of all models that have a vector. It is kept, and made again when models have come or gone."""
    return read_atlas(hub)
