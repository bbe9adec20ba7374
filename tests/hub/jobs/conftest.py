"""An open hub on both databases, and a stranger's plugins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlmodel import SQLModel

from modelgrove_hub import tables  # noqa: F401  (makes the tables known to SQLModel.metadata)
from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings

STRANGERS = Path(__file__).parents[1] / "fixtures"
TABLES = ("model", "revision", "blob", "job")


@pytest.fixture
def hub(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose leases run out after 0.6 s."""
    monkeypatch.syspath_prepend(STRANGERS)
    opened = Hub.open(Settings(home=tmp_path, database_url=database_url, lease_seconds=0.6))
    # All tables would take PostgreSQL a second and more for each test.
    SQLModel.metadata.create_all(opened.engine, [SQLModel.metadata.tables[name] for name in TABLES])
    yield opened
    opened.engine.dispose()
