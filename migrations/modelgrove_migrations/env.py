"""Alembic's environment: which database, which tables, and how to change them without losing rows.

Alembic runs this file. The connection comes from `run.py` in `config.attributes`; when a
developer runs `alembic` in the repository, it is made from the settings.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from modelgrove_hub.errors import StorageError
from modelgrove_hub.registry.database import connect
from modelgrove_hub.settings import settings
from modelgrove_hub.tables import Model

_LOCK = 0x6D6F64656C67  # "modelg": any number that no other program on the server uses


def migrate(connection: Connection) -> None:
    """Run the wanted migrations in one transaction: all of them happen, or none.

    Raises:
        StorageError: a migration left rows that point to nothing; it was rolled back.
    """
    backend = connection.dialect.name
    if backend == "sqlite":
        # A batch operation copies a table and drops the old one. With foreign keys on, that
        # drop would delete every row that points there. SQLite obeys only outside a transaction.
        connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
    context.configure(
        connection=connection,
        target_metadata=Model.metadata,
        render_as_batch=True,
        transactional_ddl=True,  # true of SQLite too, because `connect` says BEGIN itself
        compare_server_default=True,
    )
    with context.begin_transaction():
        if backend == "postgresql":
            connection.exec_driver_sql(
                f"SELECT pg_advisory_xact_lock({_LOCK})"
            )  # SQLite's BEGIN IMMEDIATE does as much
        context.run_migrations()
        if backend == "sqlite":
            _check_references(connection)


def _check_references(connection: Connection) -> None:
    lost = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    if lost:
        names = ", ".join(sorted({f"{row[0]} → {row[2]}" for row in lost}))
        raise StorageError(
            f"the migration would leave {len(lost)} rows that point to nothing ({names}); nothing was changed: "
            "run `modelgrove fsck --fix`, then `modelgrove db upgrade` again"
        )


def run() -> None:
    """Migrate with the caller's connection, or with one of our own."""
    given = context.config.attributes.get("connection")
    if given is not None:
        migrate(given)
        return
    engine = connect(settings().database)
    try:
        with engine.connect() as connection:
            migrate(connection)
    finally:
        engine.dispose()


run()
