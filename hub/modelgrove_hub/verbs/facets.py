"""Verb of facets: what there is to filter by, with how many models each value has."""

from __future__ import annotations

from pydantic import BaseModel
from sqlmodel import col, func, select

from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Model
from modelgrove_hub.verbs.verb import verb

_MOST = 40
"""Values a facet shows: nobody reads a longer list."""


class Facets(BaseModel):
    """Counts of models by the values that filters take, the commonest first."""

    models: int
    kind: dict[str, int]
    family: dict[str, int]
    adapter_type: dict[str, int]
    base: dict[str, int]
    licence: dict[str, int]
    trust: dict[str, int]


@verb("GET", "/facets")
def facets(hub: Hub) -> Facets:
    """How many models there are, and of which kinds, families, types, declared bases, licences and trust."""
    columns = {
        "kind": col(Model.kind), "family": col(Model.family), "adapter_type": col(Model.adapter_type),
        "base": col(Model.declared_base), "licence": col(Model.licence), "trust": col(Model.trust),
    }  # fmt: skip
    counts: dict[str, dict[str, int]] = {}
    with hub.reading() as session:
        total = session.exec(select(func.count(col(Model.id)))).one()
        for name, column in columns.items():
            number = func.count(col(Model.id))
            query = select(column, number).where(column.is_not(None)).group_by(column)
            rows = session.exec(query.order_by(number.desc(), column).limit(_MOST))
            counts[name] = {str(value): count for value, count in rows}
    return Facets(models=total, **counts)
