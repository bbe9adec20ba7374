"""Databases for tests: SQLite in a temporary folder, and a schema of its own in a real PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from modelgrove_hub.registry.database import connect
from sqlalchemy.exc import OperationalError

POSTGRES = os.environ.get("MODELGROVE_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/test")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'modelgrove.db'}"


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """The URL of a new, empty PostgreSQL schema, dropped afterwards."""
    engine = connect(POSTGRES)
    schema = f"modelgrove_{uuid4().hex[:12]}"
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    except OperationalError as error:
        pytest.skip(
            f"PostgreSQL does not answer at {POSTGRES} ({str(error.orig).splitlines()[0]}). Start it: "
            "pg_ctlcluster 15 main start && createdb -h 127.0.0.1 -U postgres test"
        )
    yield f"{POSTGRES}?options=-csearch_path%3D{schema}"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.service)])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each test that takes this runs on both databases."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url
