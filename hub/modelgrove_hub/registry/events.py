"""The audit trail: who did what to which model. A hash chain, so that nobody changes the past unseen.

Every event holds the hash of the one before it and its own, SHA-256 of its fields as canonical JSON. Whoever may write
to the database can still write the whole chain anew, or cut off its end: that shows against a head that was noted
elsewhere, for `check_chain` finds it or says that it is gone. Events are never removed, neither by `rm` nor by `gc`.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from sqlmodel import Session, col, select

from modelgrove_hub.registry.database import take_turn
from modelgrove_hub.tables import Event, now

START = "0" * 64
"""What the first event has as the hash of the one before it, and the head of an empty log."""
_BATCH = 1000


@dataclass(frozen=True)
class Chain:
    """What became of a check: how many events were sound, the hash of the last of them, and the first fault."""

    sound: int
    head: str
    broken: str = ""
    """The first event that is not as it was written, for people; empty if there is none."""
    problem: str = ""


def record(session: Session, action: str, subject: str, **detail: Any) -> Event:
    """Append an event to the caller's transaction: both are kept, or neither. `detail` holds JSON values.

    Takes the turn, so other writers of events wait until the transaction ends.
    """
    take_turn(session)
    number, previous = head(session)
    plain = json.loads(json.dumps(detail, allow_nan=False))
    event = Event(id=number + 1, at=now(), action=action, subject=subject, detail=plain, previous=previous, hash="")
    event.hash = hash_of(event)
    session.add(event)
    session.flush()
    return event


def head(session: Session) -> tuple[int, str]:
    """The number and hash of the newest event; 0 and `START` if there is none."""
    newest = select(Event.id, Event.hash).order_by(col(Event.id).desc()).limit(1)
    number, digest = session.exec(newest).first() or (0, START)
    return number or 0, digest


def list_events(session: Session, limit: int, before: int | None = None) -> list[Event]:
    """The newest events, or the newest before the one of that number; newest first."""
    query = select(Event).order_by(col(Event.id).desc()).limit(limit)
    return list(session.exec(query if before is None else query.where(col(Event.id) < before)))


def hash_of(event: Event) -> str:
    """SHA-256 of the event's fields but `hash`: JSON in ASCII, keys sorted, no spaces, the time in UTC."""
    fields = event.model_dump(exclude={"hash"})
    fields["at"] = event.at.astimezone(UTC).isoformat(timespec="microseconds")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_chain(session: Session, known: str = START) -> Chain:
    """Follow the chain from its start to the first event that is not as it was written.

    `known` is a head noted earlier: a sound chain without it was cut off or written anew.
    """
    number, last, seen = 0, START, known == START
    query = select(Event).order_by(col(Event.id))
    options = {"yield_per": _BATCH, "populate_existing": True}
    try:
        with closing(session.exec(query, execution_options=options)) as events:
            for event in events:
                if problem := _fault(event, last):
                    return Chain(number, last, _named(event), problem)
                number, last = number + 1, event.hash
                seen = seen or last == known
    except ValueError as error:  # SQLite keeps any bytes in a column of JSON or of times
        return Chain(number, last, f"the event after number {number}", f"cannot be read: {error}")
    if not seen:
        return Chain(number, last, "event log", f"does not hold the head {known}: it was cut off, or written anew")
    return Chain(number, last)


def _fault(event: Event, last: str) -> str:
    if event.previous != last:
        return "does not follow the one before it: an event was removed, added or moved here"
    return "" if event.hash == hash_of(event) else "is not as it was written: its fields do not have its hash"


def _named(event: Event) -> str:
    return f"event {event.id} ({event.action} {event.subject})"
