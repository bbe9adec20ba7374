"""Which models a list of the Hugging Face API shows: what clients filter by is compared with what lists say of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlmodel import Session, col, select

from modelgrove_hub.api.hf.infos import CARD, fields_of, info_of
from modelgrove_hub.api.hf.repos import heads_of
from modelgrove_hub.errors import UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Blob, Commit, Model, Revision, RevisionFile

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BOUND = re.compile(r"(min|max):(\d{1,9}(?:\.\d{1,6})?)([KMBT]?)")


class Shown(NamedTuple):
    """A model in a list; `at` is its place among all that were asked for."""

    at: int
    model: Model
    commit: Commit
    revision: Revision
    facts: dict[str, Any]


@dataclass(frozen=True)
class Filters:
    """What a model must have: all of the tags, the task, and so many parameters."""

    tags: frozenset[str]
    task: str = ""
    least: float = 0
    most: float = float("inf")

    @classmethod
    def read(cls, tags: Iterable[str], task: str, parameters: str) -> Filters:
        """The filters of a request; `parameters` is like "min:1B,max:7B".

        Raises:
            UsageError: it is not.
        """
        bounds = {"min": 0.0, "max": float("inf")}
        for part in filter(None, parameters.split(",")):
            found = _BOUND.fullmatch(part.strip())
            if found is None:
                raise UsageError(f"num_parameters is like min:1B,max:7B, not {parameters[:80]!a}")
            bounds[found[1]] = float(found[2]) * _UNITS[found[3]]
        wanted = (part.strip().lower() for each in tags for part in each.split(","))
        return cls(frozenset(filter(None, wanted)), task.lower(), bounds["min"], bounds["max"])

    def any(self) -> bool:
        """Whether there may be models that do not fit."""
        return self != Filters(frozenset())

    def fit(self, model: Model, revision: Revision, facts: Mapping[str, Any]) -> bool:
        """Whether a model has all that."""
        if self.task and str(facts.get("pipeline_tag", "")).lower() != self.task:
            return False
        if not self.least <= revision.parameters <= self.most:
            return False
        return self.tags <= {model.kind, *(tag.lower() for tag in facts["tags"])}


def shown(session: Session, hub: Hub, query: Any, filters: Filters, start: int, chunk: int) -> Iterator[Shown]:
    """The models of a query from its place `start` on that fit, read so many at a time."""
    while models := session.exec(query.offset(start).limit(chunk)).all():
        heads = heads_of(session, models)
        cards = _cards(session, [revision for _, revision in heads.values()])
        for at, model in enumerate(models, start):
            commit, revision = heads[model.id or 0]
            card = cards.get(revision.id or 0)
            facts = info_of(model, commit, revision, fields_of(hub, model.name, card) if card else {})
            if filters.fit(model, revision, facts):
                yield Shown(at, model, commit, revision, facts)
        start += len(models)


def _cards(session: Session, revisions: Sequence[Revision]) -> dict[int, Blob]:
    query = select(RevisionFile.revision_id, Blob).join(Blob, col(Blob.sha256) == col(RevisionFile.sha256))
    numbers = [revision.id for revision in revisions]
    return dict(session.exec(query.where(col(RevisionFile.revision_id).in_(numbers), RevisionFile.path == CARD)).all())
