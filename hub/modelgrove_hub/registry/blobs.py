"""Rows of blobs, written so that two processes may write the same ones at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sqlmodel import Session

from modelgrove_hub.registry.database import insert_into, take_turn
from modelgrove_hub.tables import Blob


def name_blobs(session: Session, blobs: Iterable[Blob]) -> None:
    """Make sure there is a row for each of `blobs`; one that is there stays, unless the new one is better.

    A stored copy is better than a reference, a live reference better than a dead one. Takes the
    turn first: two transactions that name the same blobs in another order would wait for each other.
    """
    take_turn(session)
    for blob in blobs:
        session.exec(insert_into(session, Blob).values(blob.model_dump()).on_conflict_do_nothing())
        known = session.get_one(Blob, blob.sha256)
        if blob.path is None or (known.path is not None and not Path(known.path).exists()):
            known.path, known.mtime_ns = blob.path, blob.mtime_ns
