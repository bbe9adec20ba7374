"""`modelgrove token` on the hub of this machine."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from modelgrove_hub.cli.token import token
from modelgrove_hub.errors import ConflictError, UsageError
from modelgrove_hub.settings import settings
from modelgrove_migrations.run import upgrade


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELGROVE_HOME", str(tmp_path))
    settings.cache_clear()
    upgrade(settings().database)

    def run(*arguments):
        result = CliRunner().invoke(token, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    yield run
    settings.cache_clear()


def test_a_token_is_printed_alone_once_and_listed_without_its_secret(run):
    made = run("create", "alice", "--scope", "write")
    assert made.stdout.startswith("modelgrove_")
    assert made.stdout.count("\n") == 1
    assert "not shown again" in made.stderr
    listed = run("ls", "--json").stdout
    assert made.stdout.strip() not in listed
    assert [(row["name"], row["scopes"], row["state"]) for row in json.loads(listed)] == [("alice", ["write"], "good")]
    run("revoke", "alice")
    assert json.loads(run("ls", "--json").stdout)[0]["state"] == "revoked"
    assert "alice" in run("ls").stdout


def test_it_may_expire(run):
    made = json.loads(run("create", "alice", "--expires", "90d", "--json").stdout)
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=89, hours=23) < left <= timedelta(days=90)
    for odd in ("90", "d", "-1d", "0d", "90w"):
        assert run("create", "bob", "--expires", odd).exit_code == 2


def test_errors_are_ours(run):
    run("create", "alice")
    with pytest.raises(ConflictError):
        run("create", "alice")
    with pytest.raises(UsageError):
        run("create", "a/b")
    assert run("create", "bob", "--scope", "root").exit_code == 2
