"""Rows of blobs, written so that two processes may write the same one at once."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session

from modelgrove_hub.tables import Blob


def name_blob(session: Session, blob: Blob) -> None:
    """Make sure there is a row for `blob`; one that is there stays, unless it refers to a file that is gone.

    A stored copy is better than a reference, a live reference better than a dead one.
    """
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    session.exec(insert(Blob).values(blob.model_dump()).on_conflict_do_nothing())
    known = session.get_one(Blob, blob.sha256)
    if known.path is not None and (blob.path is None or not Path(known.path).exists()):
        known.path, known.mtime_ns = blob.path, blob.mtime_ns
