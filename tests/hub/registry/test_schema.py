"""A hub refuses a schema it does not know, and says what to run."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine, create_engine

from modelgrove_hub.errors import StorageError, UsageError
from modelgrove_hub.registry import schema
from modelgrove_hub.registry.database import connect
from modelgrove_migrations.run import downgrade


def test_the_current_schema_is_accepted(engine: Engine) -> None:
    schema.require_current(engine)


def test_a_database_without_tables_is_refused(database_url: str) -> None:
    engine = connect(database_url)
    with pytest.raises(StorageError, match="no tables yet: run `modelgrove init`, or `modelgrove db upgrade`"):
        schema.require_current(engine)
    engine.dispose()


def test_a_database_taken_back_is_refused(engine: Engine, database_url: str) -> None:
    downgrade(database_url, "base")

    with pytest.raises(StorageError, match="modelgrove db upgrade"):
        schema.require_current(engine)


@pytest.mark.parametrize(
    ("version", "advice"), [("0000", "modelgrove db upgrade"), ("9999", "install a newer modelgrove")]
)
def test_a_schema_behind_or_ahead_is_refused(engine: Engine, version: str, advice: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{version}'")

    with pytest.raises(StorageError, match=f"{version}.*{advice}"):
        schema.require_current(engine)


def test_the_check_does_not_wait_for_a_writer(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = version_num")
        checked = threading.Thread(target=schema.require_current, args=(engine,))
        checked.start()
        checked.join(10)  # a writer is waited for up to 30 s
        assert not checked.is_alive()


def test_a_server_that_does_not_answer_is_a_storage_error_without_the_password() -> None:
    engine = connect("postgresql://nobody:secret@127.0.0.1:1/nothing")

    with pytest.raises(StorageError, match="127") as caught:
        schema.require_current(engine)
    assert "secret" not in str(caught.value)


def test_another_kind_of_database_is_refused() -> None:
    class Other:
        dialect = type("Dialect", (), {"name": "oracle"})
        url = create_engine("sqlite://").url

    with pytest.raises(UsageError, match="sqlite:///PATH or postgresql"):
        schema.require_current(Other())
