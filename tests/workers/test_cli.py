"""`modelgrove worker` and `modelgrove up` as commands. What they start is tested in test_embedded.py."""

import re
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from modelgrove_hub.errors import ConflictError, StorageError, UsageError
from modelgrove_hub.settings import settings
from modelgrove_migrations.run import upgrade
from modelgrove_workers import cli


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELGROVE_HOME", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


@pytest.fixture
def lanes(monkeypatch, home):
    """The lanes that a command would run; none is run."""
    upgrade(settings().database)
    seen = []
    monkeypatch.setattr("modelgrove_workers.embedded.Supervisor.run", lambda supervisor: seen.append(supervisor.lanes))
    monkeypatch.setattr("modelgrove_workers.embedded.core_count", lambda: 8)
    return seen


def run(command, *arguments):
    result = CliRunner().invoke(command, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_worker_takes_all_queues_and_all_cores_unless_told_otherwise(lanes):
    assert run(cli.worker).exit_code == 0
    assert run(cli.worker, "--queues", "gpu, cpu", "--concurrency", "3").exit_code == 0

    assert [[str(lane) for lane in each] for each in lanes] == [["preview+cpu+io ×8"], ["gpu+cpu ×3"]]


def test_up_keeps_previews_apart_from_long_jobs(lanes):
    result = run(cli.up, "--port", "0")
    run(cli.up, "--port", "0", "--concurrency", "2")

    assert [[str(lane) for lane in each] for each in lanes] == [
        ["cpu ×4", "preview+io ×1"],
        ["cpu ×2", "preview+io ×1"],
    ]
    assert "messages through" in result.output
    assert "Open to everybody on this machine" in result.output
    assert re.search(r"Serving .* at http://127.0.0.1:\d+\n", result.output)
    assert result.output.endswith("Stopped.\n")


@pytest.mark.parametrize("options", [("--queues", " , "), ("--concurrency", "0")])
def test_options_that_make_no_sense_are_refused(lanes, options):
    result = run(cli.worker, *options)

    assert result.exit_code == 2
    assert options[0] in result.output
    assert lanes == []


def test_without_tables_it_says_what_to_run(home):
    with pytest.raises(StorageError, match="modelgrove db upgrade"):
        run(cli.worker)


def test_an_unsupported_broker_is_refused_before_anything_starts(lanes, monkeypatch):
    monkeypatch.setenv("MODELGROVE_BROKER_URL", "sqla+sqlite:///jobs.db")
    settings.cache_clear()

    with pytest.raises(UsageError, match="is not supported"):
        run(cli.up, "--port", "0")
    assert lanes == []


def test_up_on_an_address_in_use_starts_nothing(lanes):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match=f"127.0.0.1:{port} is in use"):
            run(cli.up, "--port", str(port))
    assert lanes == []


def test_the_commands_load_without_celery_and_the_database():
    code = "import modelgrove_workers.cli, sys; print({'celery', 'sqlmodel', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
