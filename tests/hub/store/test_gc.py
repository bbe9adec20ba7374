"""Only what nothing names goes, and only when it is old enough; a crash or a rival loses nothing."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from pathlib import Path
from signal import SIGKILL

import pytest
from click.testing import CliRunner, Result
from sqlmodel import SQLModel, select

from modelgrove_hub.cli.gc import gc
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.models import remove
from modelgrove_hub.settings import Settings, settings
from modelgrove_hub.store.disk import create_temporary
from modelgrove_hub.store.fsck import check
from modelgrove_hub.store.gc import (
    Collected,
    collect,
    find_garbage,
    find_leftovers,
    named,
    naming_columns,
    remove_garbage,
    remove_leftovers,
)
from modelgrove_hub.tables import Blob, Expert, Job, JobState, RevisionFile


@pytest.fixture
def eager(hub: Hub) -> Hub:
    """The same hub for which every blob is old enough."""
    return Hub(hub.settings.model_copy(update={"gc_grace_seconds": 0.0}), hub.engine, hub.store)


def _forget(hub: Hub, name: str) -> None:
    with hub.transaction() as session:
        remove(session, name)


def _rows(hub: Hub) -> set[str]:
    with hub.transaction() as session:
        return set(session.exec(select(Blob.sha256)))


def _stored(hub: Hub) -> set[str]:
    return {blob.sha256 for blob in hub.store}


def test_what_a_model_names_stays_and_what_it_named_goes(eager: Hub, register) -> None:
    register("zoo/apple", 1.0)
    kept = _stored(eager)
    register("zoo/pear", 2.0)
    assert find_garbage(eager) == []

    _forget(eager, "zoo/pear")
    removed = list(remove_garbage(eager, find_garbage(eager)))

    assert len(removed) == 2  # the file and its manifest
    assert _stored(eager) == _rows(eager) == kept
    assert list(check(eager, full=True)) == []


def test_bytes_of_a_crash_before_their_rows_go(eager: Hub) -> None:
    blob = eager.store.put_bytes(b"from a process that was killed")

    assert [item.sha256 for item in remove_garbage(eager, find_garbage(eager))] == [blob.sha256]
    assert _stored(eager) == set()


def test_a_fresh_blob_is_kept_for_whoever_is_about_to_name_it(hub: Hub, register) -> None:
    hub.store.put_bytes(b"an ingest put this and has not written its rows yet")
    register("zoo/apple")
    _forget(hub, "zoo/apple")
    before = _stored(hub), _rows(hub)

    assert find_garbage(hub) == []
    assert list(remove_garbage(hub, find_garbage(hub))) == []
    assert (_stored(hub), _rows(hub)) == before


def test_an_ingest_that_puts_old_garbage_again_keeps_it(hub: Hub, eager: Hub, register) -> None:
    register("zoo/apple", 1.0)
    _forget(hub, "zoo/apple")
    garbage = find_garbage(eager)
    assert len(garbage) == 2

    # Between the look and the removal an ingest stores the same content; its rows come later.
    aged = Hub(hub.settings.model_copy(update={"gc_grace_seconds": 3600.0}), hub.engine, hub.store)
    assert list(remove_garbage(aged, garbage)) == []
    register("zoo/apple", 1.0)

    assert list(check(hub, full=True)) == []


def test_an_ingest_that_names_garbage_after_the_look_keeps_it(eager: Hub, register) -> None:
    register("zoo/apple", 1.0)
    _forget(eager, "zoo/apple")
    garbage = find_garbage(eager)
    register("zoo/apple", 1.0)

    assert list(remove_garbage(eager, garbage)) == []
    assert list(check(eager, full=True)) == []


def test_a_kill_in_the_middle_leaves_the_rest_for_the_next_run(eager: Hub, register) -> None:
    for number in range(3):
        register(f"zoo/m{number}", float(number))
    for number in range(3):
        _forget(eager, f"zoo/m{number}")
    killed = get_context("fork").Process(target=_collect_two_and_die, args=(eager.settings,))
    killed.start()
    killed.join(60)

    assert killed.exitcode == -SIGKILL
    assert list(check(eager, full=True)) == []
    assert len(list(remove_garbage(eager, find_garbage(eager)))) == 4
    assert _stored(eager) == _rows(eager) == set()


def _collect_two_and_die(settings: Settings) -> None:
    hub = Hub.open(settings)  # connections do not survive a fork
    removal = remove_garbage(hub, find_garbage(hub))
    next(removal), next(removal)
    os.kill(os.getpid(), SIGKILL)


def test_a_referenced_file_is_never_removed(eager: Hub, register, tmp_path: Path) -> None:
    register("zoo/apple", referenced=True)
    _forget(eager, "zoo/apple")

    removed = list(remove_garbage(eager, find_garbage(eager)))

    assert sorted(item.stored for item in removed) == [False, True]  # its row, and its manifest's bytes
    assert _rows(eager) == set()
    assert (tmp_path / "files" / "zoo-apple.safetensors").exists()


def test_an_experts_weights_and_a_jobs_artefacts_are_named(eager: Hub) -> None:
    weights, picture = eager.store.put_bytes(b"weights"), eager.store.put_bytes(b"picture")
    with eager.transaction() as session:
        session.add_all([Blob(sha256=blob.sha256, size=blob.size) for blob in (weights, picture)])
        session.flush()
        session.add(Expert(tree="zoo", encoder="gram-ridge", text_space="minilm", blob=weights.sha256))
        outputs = {"report": {"big": "x"}, "models": [], "artefacts": {"grid.png": picture.sha256}}
        session.add(Job(id="j1", plugin="p", state=JobState.DONE, idempotency_key="1", outputs=outputs))
        session.add(Job(id="j2", plugin="p", state=JobState.QUEUED, idempotency_key="2"))

    assert find_garbage(eager) == []
    with eager.transaction() as session:
        assert named(session) == {weights.sha256, picture.sha256}
        assert named(session, [picture.sha256, "0" * 64]) == {picture.sha256}


def test_a_table_that_learns_to_name_blobs_is_found_by_itself() -> None:
    columns = {str(column) for column in naming_columns()}

    assert columns == {"revision_file.sha256", "revision_file.manifest", "expert.blob", "attestation.sha256"}
    assert RevisionFile.__tablename__ in SQLModel.metadata.tables


def test_a_dead_jobs_folder_goes_and_a_running_jobs_stays(hub: Hub, eager: Hub) -> None:
    with hub.transaction() as session:
        session.add(Job(id="alive", plugin="p", state=JobState.RUNNING, idempotency_key="1"))
    for name in ("alive-1", "dead-2", "signing_x"):
        folder = hub.settings.home / "tmp" / name
        folder.mkdir(parents=True)
        (folder / "half.safetensors").write_bytes(b"x")
    assert find_leftovers(hub) == []  # too young

    remove_leftovers(find_leftovers(eager))

    assert [path.name for path in (hub.settings.home / "tmp").iterdir()] == ["alive-1"]


def test_a_dry_run_finds_what_the_run_removes(hub: Hub, eager: Hub, register) -> None:
    register("zoo/apple")
    _forget(eager, "zoo/apple")
    (hub.settings.home / "tmp" / "dead-1").mkdir(parents=True)
    draft, _ = create_temporary(hub.store.path(next(iter(_stored(hub)))).parents[2] / "drafts")
    draft.close()
    assert collect(hub) == Collected([], [], 0)  # too young

    planned = collect(eager, dry_run=True)

    assert (len(planned.garbage), len(planned.folders), planned.drafts) == (2, 1, 1)
    assert collect(eager, dry_run=True) == planned
    assert collect(eager) == planned
    assert collect(eager) == Collected([], [], 0)


@pytest.fixture
def command(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELGROVE_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MODELGROVE_GC_GRACE_SECONDS", "0")

    def run(hub: Hub, *words: str) -> Result:
        monkeypatch.setenv("MODELGROVE_DATABASE_URL", hub.settings.database_url)
        settings.cache_clear()
        return CliRunner().invoke(gc, words, catch_exceptions=False)

    yield run
    settings.cache_clear()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_dry_run_says_what_and_how_much_and_does_nothing(hub: Hub, register, command) -> None:
    revision = register("zoo/apple")
    _forget(hub, "zoo/apple")

    planned = json.loads(command(hub, "--dry-run", "--json").stdout)

    assert planned["removed"] is False
    assert planned["bytes"] == sum(blob.size for blob in hub.store) > revision.size
    assert len(_stored(hub)) == 2
    done = command(hub)
    assert done.stderr.startswith("Freed ")
    assert "in 2 blobs" in done.stderr
    assert _stored(hub) == set()
