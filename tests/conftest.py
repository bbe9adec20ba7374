"""Databases for tests (SQLite files, and schemas of their own in a real PostgreSQL), and a hub with real models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.database import connect
from modelgrove_hub.registry.models import add_revision
from modelgrove_hub.settings import Settings, settings
from modelgrove_hub.tables import Blob, Revision
from modelgrove_migrations.run import upgrade

POSTGRES = os.environ.get("MODELGROVE_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/test")
BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.service)]


@pytest.fixture(scope="module", autouse=True)
def fresh_settings() -> Iterator[None]:
    """No module sees the hub that another one's commands opened in the same process."""
    settings.cache_clear()
    yield
    settings.cache_clear()


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


@pytest.fixture
def hub(tmp_path: Path, database_url: str) -> Iterator[Hub]:
    """An empty hub of the test's own, on each kind of database."""
    upgrade(database_url)
    hub = Hub.open(Settings(home=tmp_path / "hub", database_url=database_url))
    yield hub
    hub.engine.dispose()


@pytest.fixture
def register(hub: Hub, tmp_path: Path) -> Callable[..., Revision]:
    """Register a model: one safetensors file, in the store or referenced, and its manifest in the store."""
    import torch
    from safetensors.torch import save_file

    def register(name: str, fill: float = 1.0, *, referenced: bool = False, trust: str = "ok") -> Revision:
        file = tmp_path / "files" / f"{name.replace('/', '-')}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({"weight": torch.full((2, 3), fill)}, file, {"name": name})  # two keys would be written in any order
        stored = hub.store.put(file)
        manifest = hub.store.put_bytes(f"manifest of {name} {fill}".encode())
        place = {"path": str(file), "mtime_ns": file.stat().st_mtime_ns} if referenced else {}
        if referenced:
            hub.store.delete(stored.sha256)
        with hub.transaction() as session:
            session.merge(Blob(sha256=stored.sha256, size=stored.size, **place))
            session.merge(Blob(sha256=manifest.sha256, size=manifest.size))
            _, revision, _ = add_revision(
                session, name=name, files={"model.safetensors": stored.sha256},
                manifests={"model.safetensors": manifest.sha256}, kind="adapter", family="sd1", adapter_type="lora",
                declared_base=None, licence="mit", tags=["test"], card="A card.", trust=trust,
                summary={"rank": [4], "reasons": ["it says so"]}, weights_hash=None, values_hash=None,
                inventory_hash=None, parameters=6, size=stored.size,
            )  # fmt: skip
        return revision

    return register
