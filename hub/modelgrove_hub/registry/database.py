"""Connections: SQLite in WAL mode by default, PostgreSQL by URL. The schema comes from migrations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy import create_engine as sqlalchemy_engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import ORMExecuteState, with_loader_criteria
from sqlmodel import Session, SQLModel, col

from modelgrove_hub.errors import StorageError
from modelgrove_hub.tables import Model

_READING = "modelgrove_reading"
_PUBLIC_ONLY = "modelgrove_public_only"
EVERYTHING = "modelgrove_everything"
"""Execution option of a query that also finds private models."""
_TURN = 1
"""Number of the lock: our only one. The other half of its key is the schema, for hubs may share a database."""


def connect(url: str) -> Engine:
    """An engine for `url`. SQLite gets WAL, foreign keys and a 30 s wait for other writers."""
    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sqlalchemy_engine(parsed, connect_args={"timeout": 30})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin)
        return engine
    return sqlalchemy_engine(parsed, pool_pre_ping=True)


@contextmanager
def transaction(engine: Engine, *, public_only: bool = False) -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any exception. With `public_only` no private model is seen.

    Raises:
        StorageError: the database does not answer or refuses the work.
    """
    try:
        info = {_PUBLIC_ONLY: public_only}
        with Session(engine, expire_on_commit=False, info=info) as session, session.begin():
            yield session
    except DBAPIError as error:
        if error.connection_invalidated or type(error).__name__ == "OperationalError":
            raise StorageError(
                f"database {engine.url.render_as_string()}: {' '.join(str(error.orig).split())}"
            ) from error
        raise


@contextmanager
def reading(engine: Engine, *, public_only: bool = False) -> Iterator[Session]:
    """One transaction that only reads; on SQLite it waits for no writer, and writing in it is an error.

    Raises:
        StorageError: the database does not answer, or something was written.
    """
    with transaction(engine.execution_options(**{_READING: True}), public_only=public_only) as session:
        yield session


@event.listens_for(Session, "do_orm_execute")
def _leave_out_private(state: ORMExecuteState) -> None:
    # A name is taken by a private model too: whoever asks for that says so.
    everything = state.execution_options.get(EVERYTHING, False)
    if state.is_select and state.session.info.get(_PUBLIC_ONLY) and not everything:
        state.statement = state.statement.options(with_loader_criteria(Model, col(Model.private).is_(False)))


def take_turn(session: Session) -> None:
    """Wait until no other transaction registers models; ours may until it ends.

    Without it two workers on PostgreSQL may both find a name free and take it. On SQLite every
    writer is alone.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.connection().exec_driver_sql(f"SELECT pg_advisory_xact_lock(hashtext(current_schema()), {_TURN})")


def insert_into(session: Session, table: type[SQLModel]) -> Any:
    """An INSERT in the session's dialect, which can be told what to do where the row is there already."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, see _begin
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    # A deferred transaction that first reads and then writes fails at once under a second
    # writer ("database is locked"), whatever the timeout; taking the lock first waits.
    reads = connection.get_execution_options().get(_READING, False)
    connection.exec_driver_sql(f"PRAGMA query_only={'ON' if reads else 'OFF'}")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
