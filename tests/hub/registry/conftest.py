"""Registry tests run on SQLite and on PostgreSQL."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import Session

from modelgrove_hub.registry.database import connect
from modelgrove_hub.registry.models import add_revision
from modelgrove_hub.tables import Blob, Model, Revision
from modelgrove_migrations.run import upgrade

sys.path.insert(0, str(Path(__file__).parent))  # tests share `other_base`

Add = Callable[..., tuple[Model, Revision, bool]]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A migrated database of the test's own, for tests that commit."""
    upgrade(database_url)
    engine = connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def session(shared_engine: Engine) -> Iterator[Session]:
    """A transaction that is rolled back after the test."""
    with Session(shared_engine, expire_on_commit=False) as session:
        yield session


@pytest.fixture
def add(session: Session) -> Add:
    """Register a model of one file whose content is `content`; the rest as given."""

    def add(name: str, content: str = "0", **facts: Any) -> tuple[Model, Revision, bool]:
        sha256 = f"{int(content, 16):064x}"
        if session.get(Blob, sha256) is None:
            session.add(Blob(sha256=sha256, size=7))
        usual: dict[str, Any] = {
            "files": {"model.safetensors": sha256}, "manifests": {}, "kind": "adapter", "family": "sd1",
            "adapter_type": "lora", "declared_base": None, "licence": None, "tags": [], "card": "", "trust": "ok",
            "summary": {}, "weights_hash": None, "values_hash": None, "inventory_hash": None, "parameters": 3,
            "size": 7,
        }  # fmt: skip
        return add_revision(session, name=name, **{**usual, **facts})

    return add
