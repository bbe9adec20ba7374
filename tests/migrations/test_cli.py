"""`modelgrove db` works on the database of the settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelgrove_hub.errors import DataError
from modelgrove_hub.registry import schema
from modelgrove_hub.registry.database import connect
from modelgrove_hub.settings import settings
from modelgrove_migrations import run
from modelgrove_migrations.cli import db


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MODELGROVE_HOME", str(tmp_path / "hub"))
    settings.cache_clear()
    yield settings().database
    settings.cache_clear()


def invoke(*words: str) -> Result:
    return CliRunner().invoke(db, words, catch_exceptions=False)


def test_upgrade_makes_the_tables_and_says_so(url: str) -> None:
    planned = invoke("upgrade", "--dry-run")
    assert run.current(url) is None

    done = invoke("upgrade")
    assert planned.stdout == done.stdout != ""
    assert run.current(url) == schema.HEAD
    assert "up to date" in invoke("upgrade").stderr


def test_upgrade_speaks_json(url: str) -> None:
    answer = json.loads(invoke("upgrade", "--json").stdout)

    assert answer["done"] is True
    assert answer["backup"] is None
    assert answer["steps"][0].startswith("0001 ")


def test_current_names_the_newest_when_behind(url: str) -> None:
    assert invoke("current").stdout == f"base (newest: {schema.HEAD})\n"
    invoke("upgrade")
    assert invoke("current").stdout == f"{schema.HEAD}\n"
    assert json.loads(invoke("current", "--json").stdout) == {"current": schema.HEAD, "head": schema.HEAD}


def test_downgrade_asks_first_and_keeps_a_backup(url: str) -> None:
    invoke("upgrade")

    assert invoke("downgrade", "base").exit_code == 1  # no answer is a no
    assert run.current(url) == schema.HEAD

    answer = json.loads(invoke("downgrade", "base", "--yes", "--json").stdout)
    assert answer["revision"] is None
    assert run.current(f"sqlite:///{answer['backup']}") == schema.HEAD
    assert "schema is at base" in invoke("downgrade", "base", "--yes").stderr


def test_check_agrees_or_lists_the_differences_and_fails(url: str) -> None:
    invoke("upgrade")
    assert "agree" in invoke("check").stderr
    assert json.loads(invoke("check", "--json").stdout) == {"differences": []}

    engine = connect(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_job_state")
    engine.dispose()
    with pytest.raises(DataError, match=r"1 place$"):
        invoke("check")
