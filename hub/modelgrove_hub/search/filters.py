"""Which models a search looks at: facts of the registry, compared in the database."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, or_
from sqlmodel import Session, col, func, select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.tables import Model, Revision

_RANK = re.compile(r"(\d{1,6})|(\d{0,6})(?:\.\.|-)(\d{0,6})")
_MOST = 999_999


@dataclass(frozen=True)
class Filters:
    """Only models with these facts; None is anything. Upper and lower case are the same, except in `trust`."""

    kind: str | None = None
    family: str | None = None
    adapter_type: str | None = None
    base: str | None = None
    """The declared base, with or without its owner, or a family that the weights fit."""
    licence: str | None = None
    rank: str | None = None
    """Of all modules of an adapter: one, as "16", or a range, as "4-16", "..16" or "16.."."""
    trust: str | None = None

    def conditions(self) -> dict[str, Any]:
        """Conditions on `Model` and `Revision` by what they say.

        Raises:
            UsageError: the rank is not one.
        """
        return dict(self._conditions())

    def _conditions(self) -> Iterator[tuple[str, Any]]:
        if self.kind is not None:
            yield f"kind {self.kind!r}", Model.kind == self.kind.lower()
        if self.family is not None:
            yield f"family {self.family!r}", Model.family == self.family.lower()
        if self.adapter_type is not None:
            yield f"type {self.adapter_type!r}", Model.adapter_type == self.adapter_type.lower()
        if self.base is not None:
            yield f"base {self.base!r}", _of_base(self.base)
        if self.licence is not None:
            yield f"licence {self.licence!r}", func.lower(Model.licence) == func.lower(self.licence)
        if self.rank is not None:
            yield f"rank {self.rank!r}", _of_rank(self.rank)
        if self.trust is not None:
            yield f"trust {self.trust!r}", Model.trust == self.trust


def allowed_revisions(session: Session, filters: Filters) -> list[int] | None:
    """The revisions that pass; None when all do."""
    conditions = filters.conditions()
    return _passing(session, *conditions.values()) if conditions else None


def excluded(session: Session, filters: Filters) -> str | None:
    """A sentence about which filters leave nothing, when they do."""
    conditions = filters.conditions()
    if not conditions or _passing(session, *conditions.values(), most=1):
        return None
    empty = [said for said, condition in conditions.items() if not _passing(session, condition, most=1)]
    if empty:
        return f"No model here is of {' or of '.join(empty)}."
    return f"No model here is of {' and of '.join(conditions)} at once."


def read_rank(text: str) -> tuple[int, int]:
    """The smallest and the largest rank that `text` allows.

    Raises:
        UsageError: it is not of the forms "16", "4-16", "..16" and "16..".
    """
    match = _RANK.fullmatch(text.strip())
    if match is None or text.strip() in ("..", "-"):
        raise UsageError(f"rank {text!r}: give one, as 16, or a range, as 4-16, ..16 or 16..")
    if match[1]:
        return int(match[1]), int(match[1])
    low, high = int(match[2] or 0), int(match[3] or _MOST)
    if low > high:
        raise UsageError(f"rank {text!r}: the first number of a range is the smaller one")
    return low, high


def _of_rank(text: str) -> Any:
    low, high = read_rank(text)
    least, most = (col(Revision.summary)[("ranks", end)].as_integer() for end in ("min", "max"))
    return and_(least >= low, most <= high)


def _of_base(name: str) -> Any:
    declared, wanted = func.lower(Model.declared_base), func.lower(name)
    # Candidates are a list of families in JSON: their text has the family in quotes.
    candidates = col(Revision.summary)["base_candidates"].as_string()
    return or_(
        declared == wanted,
        declared.endswith("/" + name.lower(), autoescape=True),
        candidates.contains(json.dumps(name.lower()), autoescape=True),
    )


def _passing(session: Session, *conditions: Any, most: int | None = None) -> list[int]:
    query = select(Revision.id).join(Model, col(Model.id) == col(Revision.model_id)).where(*conditions).limit(most)
    return [one for one in session.exec(query) if one is not None]
