"""Every way in which rows and files can disagree is found, and named with a way out."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlmodel import delete, select, update

from modelgrove_hub.cli.fsck import fsck
from modelgrove_hub.errors import DataError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.settings import settings
from modelgrove_hub.store.fsck import Finding, check
from modelgrove_hub.tables import Blob, Edge, Expert, Job, JobState, Model, Revision, RevisionFile


def _one(hub: Hub, *, full: bool = False) -> Finding:
    findings = list(check(hub, full=full))
    assert len(findings) == 1, findings
    return findings[0]


def _blob(hub: Hub, revision: Revision) -> str:
    with hub.transaction() as session:
        return session.exec(select(RevisionFile.sha256).where(RevisionFile.revision_id == revision.id)).one()


def test_a_sound_hub_has_no_findings(hub: Hub, register) -> None:
    register("zoo/apple", 1.0)
    register("zoo/pear", 2.0, referenced=True)
    hub.store.put_bytes(b"unnamed bytes are gc's business")

    assert list(check(hub, full=True)) == []


def test_an_empty_hub_has_no_findings(hub: Hub) -> None:
    assert list(check(hub, full=True)) == []


def test_a_missing_blob_is_named_with_its_model(hub: Hub, register) -> None:
    hub.store.delete(_blob(hub, register("zoo/apple")))

    finding = _one(hub)

    assert finding.level == "error"
    assert finding.subject.startswith("zoo/apple: model.safetensors")
    assert finding.problem == "is not in the blob store"
    assert "modelgrove rm" in finding.way_out


def test_a_missing_manifest_is_named(hub: Hub, register) -> None:
    register("zoo/apple")
    with hub.transaction() as session:
        hub.store.delete(session.exec(select(RevisionFile.manifest)).one())

    assert _one(hub).subject.startswith("zoo/apple: manifest of model.safetensors")


def test_a_blob_of_another_size_is_found_without_reading_it(hub: Hub, register) -> None:
    path = hub.store.path(_blob(hub, register("zoo/apple")))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])

    assert "bytes in the blob store, not" in _one(hub).problem


def test_a_damaged_blob_is_found_when_everything_is_read(hub: Hub, register) -> None:
    path = hub.store.path(_blob(hub, register("zoo/apple")))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)

    assert list(check(hub)) == []
    assert _one(hub, full=True).problem == "has other bytes in the blob store than its hash says"


def test_a_referenced_file_that_is_gone_is_named(hub: Hub, register, tmp_path: Path) -> None:
    register("zoo/apple", referenced=True)
    (tmp_path / "files" / "zoo-apple.safetensors").unlink()

    finding = _one(hub)
    assert "zoo-apple.safetensors: No such file" in finding.problem
    assert finding.fix is None


def test_a_referenced_file_with_other_content_is_named(hub: Hub, register, tmp_path: Path) -> None:
    register("zoo/apple", referenced=True)
    file = tmp_path / "files" / "zoo-apple.safetensors"
    file.write_bytes(file.read_bytes()[::-1])

    assert "has other content now" in _one(hub).problem


def test_other_content_with_the_old_time_is_found_when_everything_is_read(hub: Hub, register, tmp_path: Path) -> None:
    register("zoo/apple", referenced=True)
    file = tmp_path / "files" / "zoo-apple.safetensors"
    time = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(time, time))

    assert list(check(hub)) == []
    assert "has other content now" in _one(hub, full=True).problem


def test_a_referenced_file_that_was_only_touched_is_put_right(hub: Hub, register, tmp_path: Path) -> None:
    revision = register("zoo/apple", referenced=True)
    os.utime(tmp_path / "files" / "zoo-apple.safetensors", ns=(1, 1))
    with pytest.raises(DataError):
        load_input(hub, revision.id)

    finding = _one(hub)
    assert (finding.level, "content is the same" in finding.problem) == ("warning", True)
    finding.fix(hub)

    assert list(check(hub)) == []
    assert load_input(hub, revision.id).files()


def test_the_stores_copy_stands_in_for_a_lost_reference(hub: Hub, register, tmp_path: Path) -> None:
    revision = register("zoo/apple", referenced=True)
    file = tmp_path / "files" / "zoo-apple.safetensors"
    hub.store.put(file)
    file.unlink()

    _one(hub).fix(hub)

    assert list(check(hub, full=True)) == []
    assert next(load_input(hub, revision.id).tensors()).name == "weight"


def test_a_lost_expert_or_artefact_is_found(hub: Hub) -> None:
    with hub.transaction() as session:
        session.add(Blob(sha256="a" * 64, size=1))
        session.flush()
        session.add(Expert(tree="zoo", encoder="gram-ridge", text_space="minilm", blob="a" * 64))
        session.add(
            Job(id="j", plugin="p", state=JobState.DONE, idempotency_key="1", outputs={"artefacts": {"x": "b" * 64}})
        )

    assert sorted(finding.problem for finding in check(hub)) == ["is not in the blob store", "no row tells its size"]


def test_a_revision_whose_files_changed_is_named(hub: Hub, register) -> None:
    revision = register("zoo/apple")
    with hub.transaction() as session:
        session.exec(update(RevisionFile).values(path="other.safetensors"))

    finding = _one(hub)
    assert finding.subject == f"zoo/apple@{revision.digest[:12]}"
    assert finding.problem == "its files are not those it was made of"


def test_a_model_without_revision_is_named(hub: Hub, register) -> None:
    register("zoo/apple")
    with hub.transaction() as session:
        session.exec(delete(Revision))

    assert (_one(hub).subject, _one(hub).problem) == ("zoo/apple", "has no revision")


def test_garbage_is_not_a_finding(hub: Hub, register) -> None:
    hub.store.delete(_blob(hub, register("zoo/apple")))
    with hub.transaction() as session:
        session.exec(delete(Model))

    assert list(check(hub, full=True)) == []


def test_a_model_removed_during_the_check_is_not_a_finding(hub: Hub, register) -> None:
    hub.store.delete(_blob(hub, register("zoo/apple", 1.0)))
    hub.store.delete(_blob(hub, register("zoo/pear", 2.0)))
    findings = check(hub)
    first = next(findings)
    with hub.transaction() as session:
        session.exec(delete(Model))

    assert first.subject.startswith("zoo/")
    assert list(findings) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_rows_that_point_to_nothing_are_found_and_derived_ones_removed(hub: Hub, register) -> None:
    apple, pear = register("zoo/apple", 1.0), register("zoo/pear", 2.0)
    with hub.transaction() as session:
        session.add(Edge(child_id=pear.id, parent_id=apple.id, relation="copy"))
    connection = hub.engine.raw_connection()
    connection.driver_connection.executescript(
        f"PRAGMA foreign_keys=OFF; DELETE FROM revision WHERE id = {apple.id}; PRAGMA foreign_keys=ON"
    )
    connection.close()

    findings = {finding.subject: finding for finding in check(hub)}
    assert findings["edge.parent_id"].problem == "1 rows point to no revision"
    assert findings["revision_file.revision_id"].level == "error"
    findings["edge.parent_id"].fix(hub)

    assert "edge.parent_id" not in {finding.subject for finding in check(hub)}
    assert "revision_file.revision_id" in {finding.subject for finding in check(hub)}


def test_a_dead_jobs_folder_is_a_finding_until_it_is_removed(hub: Hub) -> None:
    folder = hub.settings.home / "tmp" / "dead-1"
    folder.mkdir(parents=True)
    os.utime(folder, (1, 1))

    _one(hub).fix(hub)

    assert list(check(hub)) == []
    assert not folder.exists()


@pytest.fixture
def command(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELGROVE_HOME", str(hub.settings.home))
    monkeypatch.setenv("MODELGROVE_DATABASE_URL", hub.settings.database_url)
    settings.cache_clear()
    yield lambda *words: CliRunner().invoke(fsck, words)
    settings.cache_clear()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_command_fails_with_exit_code_5_while_something_remains(
    register, command, hub: Hub, tmp_path: Path
) -> None:
    assert (command().exit_code, command("--full").exit_code) == (0, 0)
    register("zoo/apple", 1.0, referenced=True)
    os.utime(tmp_path / "files" / "zoo-apple.safetensors", ns=(1, 1))

    failed = command()
    assert isinstance(failed.exception, DataError)
    assert failed.exception.exit_code == 5
    assert "Way out: `modelgrove fsck --fix`" in failed.stdout
    answer = json.loads(command("--fix", "--json").stdout)
    assert (answer["remaining"], answer["findings"][0]["fixed"]) == (0, True)
    assert command().exit_code == 0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_fix_removes_what_killed_writers_left_half_written(
    command, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", 2**32)  # too big to be stored before the kill
    writer = get_context("fork").Process(target=hub.store.put, args=(tmp_path / "big",))
    writer.start()
    while not any(path.is_file() for path in (hub.settings.home / "blobs").rglob("*")):
        assert writer.is_alive()
    writer.kill()
    writer.join(60)
    monkeypatch.setenv("MODELGROVE_GC_GRACE_SECONDS", "0")
    settings.cache_clear()

    assert json.loads(command("--fix", "--json").stdout)["half_written_files_removed"] == 1
    assert json.loads(command("--fix", "--json").stdout)["half_written_files_removed"] == 0
