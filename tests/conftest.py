"""Databases for tests: SQLite files, and schemas of their own in a real PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from modelgrove_hub.registry.database import connect

POSTGRES = os.environ.get("MODELGROVE_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/test")
BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.service)]


@contextmanager
def new_postgres_schema() -> Iterator[str]:
    """The URL of a new, empty PostgreSQL schema, dropped afterwards; the test is skipped when no server answers."""
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
    try:
        yield f"{POSTGRES}?options=-csearch_path%3D{schema}"
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
        engine.dispose()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'modelgrove.db'}"


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """The URL of an empty PostgreSQL schema."""
    with new_postgres_schema() as url:
        yield url


@pytest.fixture(params=BOTH)
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database; a test that takes this runs on both kinds."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture(scope="session", params=BOTH)
def shared_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A migrated database of each kind that many tests share: none of them may commit."""
    from modelgrove_migrations.run import upgrade

    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('shared') / 'modelgrove.db'}"
        upgrade(url)
        engine = connect(url)
        yield engine
        engine.dispose()
        return
    with new_postgres_schema() as url:
        upgrade(url)
        engine = connect(url)
        yield engine
        engine.dispose()
