"""Transactions: writers wait for each other, readers for nobody."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine
from sqlmodel import select

from modelgrove_hub.errors import StorageError
from modelgrove_hub.registry.database import connect, reading, transaction
from modelgrove_hub.registry.events import record
from modelgrove_hub.tables import Event


def subjects(engine: Engine) -> list[str]:
    with reading(engine) as session:
        return list(session.exec(select(Event.subject).order_by(Event.subject)))


def test_a_reader_sees_the_last_commit_while_a_writer_is_at_work(engine: Engine) -> None:
    with transaction(engine) as session:
        record(session, "registered", "before")
    seen: list[list[str]] = []
    with transaction(engine) as session:
        record(session, "registered", "during")
        session.flush()
        reader = threading.Thread(target=lambda: seen.append(subjects(engine)))
        reader.start()
        reader.join(10)  # a writer would be waited for up to 30 s
        assert seen == [["before"]]
    assert subjects(engine) == ["before", "during"]


def test_a_reader_keeps_its_view_and_does_not_hold_a_writer_up(engine: Engine) -> None:
    with reading(engine) as session:
        assert session.exec(select(Event)).all() == []
        with transaction(engine) as writer:
            record(writer, "registered", "x")
        kept = list(session.exec(select(Event.subject)))
    # PostgreSQL reads what is committed at each statement, SQLite what was there at the first.
    assert kept == ([] if engine.dialect.name == "sqlite" else ["x"])


def test_sqlite_refuses_to_write_in_a_reading_transaction(sqlite_url: str) -> None:
    from modelgrove_migrations.run import upgrade

    upgrade(sqlite_url)
    engine = connect(sqlite_url)
    with pytest.raises(StorageError, match="readonly"), reading(engine) as session:
        record(session, "registered", "x")
    with transaction(engine) as session:  # the same pooled connection may write again
        record(session, "registered", "y")
    assert subjects(engine) == ["y"]
    engine.dispose()
