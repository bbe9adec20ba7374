"""Idempotency keys: a POST that is sent again with the same key does nothing again, and is answered as before.

Of two at the same moment both may run; jobs that ask for the same are one job all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Header, Request
from fastapi.encoders import jsonable_encoder
from sqlmodel import col, delete

from modelgrove_hub.api.access import caller_of
from modelgrove_hub.errors import ConflictError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.database import insert_into
from modelgrove_hub.tables import GivenAnswer, now

_KEPT = timedelta(days=1)


@dataclass(frozen=True)
class Once:
    """A request that is to be done once."""

    caller: str
    key: str
    path: str

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, done once for this caller and key; what was answered is kept for a day.

        Raises:
            ConflictError: the key came with another request.
        """

        def guarded(hub: Hub, **values: Any) -> Any:
            asked = json.dumps([self.path, jsonable_encoder(values)], sort_keys=True)
            request = hashlib.sha256(asked.encode()).hexdigest()
            known = self._take(hub, request)
            if known.request != request:
                raise ConflictError(f"Idempotency-Key {self.key!r} came with another request before: use a new one")
            if known.answer is not None:
                return known.answer
            try:
                answer = function(hub, **values)
            except Exception:
                self._write(hub, None)
                raise
            self._write(hub, jsonable_encoder(answer))
            return answer

        return guarded

    def _take(self, hub: Hub, request: str) -> GivenAnswer:
        with hub.transaction() as session:
            session.exec(delete(GivenAnswer).where(col(GivenAnswer.created_at) < now() - _KEPT))
            row = GivenAnswer(caller=self.caller, key=self.key, request=request)
            session.exec(insert_into(session, GivenAnswer).values(row.model_dump()).on_conflict_do_nothing())
            return session.get_one(GivenAnswer, (self.caller, self.key))

    def _write(self, hub: Hub, answer: Any) -> None:
        with hub.transaction() as session:
            row = session.get_one(GivenAnswer, (self.caller, self.key))
            if answer is None:
                session.delete(row)  # nothing was done: it may be tried again, and be another request
            else:
                row.answer = answer
                session.add(row)


Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$",
        description="Sent again with the same key, the request does nothing again and is answered as before, for a "
        "day; with the same key another request is a conflict. Keys of different callers are different.",
    ),
]  # fmt: skip


def once(request: Request, idempotency_key: Key = None) -> Once | None:
    """A dependency: what the header says, if it is there."""
    if idempotency_key is None:
        return None
    return Once(caller_of(request).name, idempotency_key, request.url.path)
