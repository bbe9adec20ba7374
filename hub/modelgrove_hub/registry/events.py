"""The audit trail: who did what to which model, appended and never changed."""

from __future__ import annotations

from typing import Any

from sqlmodel import Session

from modelgrove_hub.tables import Event


def record(session: Session, action: str, subject: str, **detail: Any) -> Event:
    """Append an event to the caller's transaction: both are kept, or neither. `detail` holds JSON values."""
    event = Event(action=action, subject=subject, detail=detail)
    session.add(event)
    return event
