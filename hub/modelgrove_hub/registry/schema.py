"""Which database schema this code needs. The migrations make it; the hub only looks."""

from __future__ import annotations

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from modelgrove_hub.errors import StorageError, UsageError

HEAD = "0007"
"""The newest migration. A test keeps this and the migrations in step."""

_HAS_TABLE = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'",
    "postgresql": "SELECT to_regclass('alembic_version')",
}


def current(engine: Engine) -> str | None:
    """The database's schema revision, or None when it has no schema of ours.

    Raises:
        StorageError: the database does not answer.
        UsageError: it is neither SQLite nor PostgreSQL.
    """
    if engine.dialect.name not in _HAS_TABLE:
        raise UsageError(f"database {engine.url.render_as_string()}: use sqlite:///PATH or postgresql://…")
    try:
        with engine.connect() as connection:
            # A plain cursor: a SQLAlchemy statement would begin a transaction, and ours on
            # SQLite waits for every writer.
            cursor = connection.connection.cursor()
            cursor.execute(_HAS_TABLE[engine.dialect.name])
            found = cursor.fetchone()
            if found is None or found[0] is None:
                return None
            cursor.execute("SELECT version_num FROM alembic_version")
            row = cursor.fetchone()
            return str(row[0]) if row else None
    except (DBAPIError, engine.dialect.loaded_dbapi.Error) as error:
        raise StorageError(
            f"database {engine.url.render_as_string()}: {' '.join(str(getattr(error, 'orig', error)).split())}"
        ) from error


def require_current(engine: Engine) -> None:
    """Refuse to work on a schema that this code does not know.

    Raises:
        StorageError: the schema is missing, behind or ahead; the message says what to run.
    """
    found = current(engine)
    where = engine.url.render_as_string()
    if found is None:
        raise StorageError(f"database {where} has no tables yet: run `modelgrove init`, or `modelgrove db upgrade`")
    if found < HEAD:
        raise StorageError(
            f"database {where} is at schema {found}, this version needs {HEAD}: run `modelgrove db upgrade`"
        )
    if found > HEAD:
        raise StorageError(
            f"database {where} is at schema {found}, newer than this version's {HEAD}: install a newer modelgrove, "
            f"or run `modelgrove db downgrade {HEAD}` with the version that made it"
        )
