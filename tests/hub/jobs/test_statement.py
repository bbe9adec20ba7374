"""Every model that a job makes has a statement of where it comes from, kept with it or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from datetime import datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlmodel import SQLModel, select, update

from modelgrove_hub.cli.show import show
from modelgrove_hub.ingest import outputs
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.run import run_job, run_local
from modelgrove_hub.jobs.statement import make_statement
from modelgrove_hub.plugins import PluginState, State
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.registry.events import check_chain, list_events
from modelgrove_hub.registry.inputs import RegisteredModel
from modelgrove_hub.registry.models import files_of, find_revision, remove
from modelgrove_hub.store.fsck import check
from modelgrove_hub.tables import Attestation, Job, Model, RevisionFile, now

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def twice(hub, register, tmp_path):
    """A job that doubles a registered model, not run yet."""
    SQLModel.metadata.create_all(hub.engine)
    source = register("ann/flower", 1.5)
    params = {"counter": str(tmp_path / "counter")}
    return rows.submit(hub, "doubling", params, [source.id], target="ann/twice", key="the key")


def _documents(hub) -> list[dict]:
    with hub.reading() as session:
        found = session.exec(select(Attestation)).all()
    return [json.loads(hub.store.path(row.sha256).read_bytes()) for row in found]


def test_the_statement_tells_files_inputs_plugin_parameters_seed_worker_and_times(hub, twice) -> None:
    job = run_local(hub, twice.id)

    (statement,) = _documents(hub)
    with hub.reading() as session:
        made, source = (find_revision(session, name) for name in ("ann/twice", "ann/flower"))
        files, read = files_of(session, made), files_of(session, source)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement["subject"] == [{"name": file["path"], "digest": {"sha256": file["sha256"]}} for file in files]
    build, details = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    asked = {"plugin": job.plugin, "params": job.params, "target": "ann/twice"}
    assert build["externalParameters"] == asked
    seed = int.from_bytes(hashlib.sha256(b"the key").digest()[:6], "big")
    assert build["internalParameters"] == {"seed": seed, "attempt": 1}
    *inputs, code = build["resolvedDependencies"]
    assert inputs == [
        {
            "name": "ann/flower/model.safetensors",
            "digest": {"sha256": read[0]["sha256"]},
            "annotations": {"role": "input", "model": "ann/flower", "revision": source.digest},
        }
    ]
    module = FIXTURES / "stranger.py"
    assert code["uri"] == "pkg:pypi/stranger@1.0"
    assert code["annotations"]["sources"] == digest_of({"stranger.py": _sha256(module)})
    assert details["builder"]["version"]["modelgrove"] == version("modelgrove")
    assert f":{os.getpid()}:" in details["builder"]["id"]
    assert details["metadata"]["invocationId"] == job.id
    started, ended = (datetime.fromisoformat(details["metadata"][name]) for name in ("startedOn", "finishedOn"))
    assert started <= ended <= job.finished_at
    with hub.reading() as session:
        (event,) = [event for event in list_events(session, 9) if event.action == "attested"]
        assert (event.subject, event.detail["kind"]) == ("ann/twice", "provenance")
        assert check_chain(session).problem == ""


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_base_that_the_plugin_could_read_is_told_once() -> None:
    base = _model("ann/base", 1, None)
    inputs = [_model("ann/one", 2, base), _model("ann/two", 3, base)]
    job = Job(id="1", plugin="merger.sum", idempotency_key="k", started_at=now())

    plugin = PluginState("sum", "merger", State.OK, "", "nobody-has-this")
    build = json.loads(make_statement(job, plugin, inputs, {"x": "0" * 64}))["predicate"]["buildDefinition"]

    *read, code = build["resolvedDependencies"]
    told = [(entry["annotations"]["role"], entry["name"]) for entry in read]
    assert told == [("input", "ann/one/w.bin"), ("input", "ann/two/w.bin"), ("base", "ann/base/w.bin")]
    assert read[2]["annotations"]["revision"] == digest_of({"w.bin": "1" * 64})
    assert code["uri"] == "pkg:pypi/nobody-has-this@unknown"
    assert "sources" not in code["annotations"]


def _model(name: str, number: int, base: RegisteredModel | None) -> RegisteredModel:
    hashes = {"w.bin": str(number) * 64}
    return RegisteredModel(name, "sd1", "lora", number, {}, "", (), {"w.bin": Path("w.bin")}, base, hashes)


def test_a_worker_killed_before_the_end_leaves_no_row_and_one_killed_after_it_all(hub, twice, monkeypatch) -> None:
    registering = outputs.attest

    def killed(*args: object) -> None:
        registering(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(outputs, "attest", killed)
    hub.engine.dispose()
    worker = get_context("fork").Process(target=run_job, args=(hub, twice.id, "elsewhere"))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    monkeypatch.setattr(outputs, "attest", registering)
    with hub.reading() as session:
        assert session.exec(select(Attestation)).all() == []
        assert list(session.exec(select(Model.name))) == ["ann/flower"]

    with hub.transaction() as session:
        rows.recover(session, 3)
        session.exec(update(type(twice)).values(lease_until=None, owner=None, state="queued"))
    assert run_local(hub, twice.id).state == "done"

    assert len(_documents(hub)) == 1
    assert [finding for finding in check(hub, full=True) if "left by a job" not in finding.problem] == []


def test_fsck_finds_a_statement_of_other_files(hub, twice) -> None:
    run_local(hub, twice.id)
    other = hub.store.put_bytes(json.dumps({"subject": [{"name": "x", "digest": {"sha256": "0" * 64}}]}).encode())
    broken = hub.store.put_bytes(b"[]")
    assert list(check(hub)) == []

    for blob, problem in ((other, "speaks of other files"), (broken, "cannot be read")):
        with hub.transaction() as session:
            outputs.name_blobs(session, [outputs.Blob(sha256=blob.sha256, size=blob.size)])
            session.exec(update(Attestation).values(sha256=blob.sha256))
        unlogged, finding = check(hub)
        assert unlogged.subject == finding.subject == f"ann/twice: provenance {blob.sha256[:12]}"
        assert unlogged.problem == "is told by no event"
        assert finding.problem.startswith(problem)


def test_fsck_names_the_model_whose_statement_is_gone(hub, twice) -> None:
    run_local(hub, twice.id)
    with hub.reading() as session:
        sha256 = session.exec(select(Attestation.sha256)).one()
    hub.store.delete(sha256)

    (finding,) = check(hub)

    assert finding.subject == f"ann/twice: provenance, blob {sha256[:12]}"


def test_show_prints_statements_one_a_line(hub, twice, monkeypatch) -> None:
    run_local(hub, twice.id)
    monkeypatch.setattr("modelgrove_hub.cli.place.open_hub", lambda: hub)

    made, given = (
        CliRunner().invoke(show, [name, "--provenance"], catch_exceptions=False) for name in ("ann/twice", "ann/flower")
    )

    assert [json.loads(line) for line in made.stdout.splitlines()] == _documents(hub)
    assert (given.stdout, given.stderr) == ("", "No job of this hub made it.\n")


def test_statements_go_with_their_model(hub, twice) -> None:
    run_local(hub, twice.id)
    with hub.transaction() as session:
        remove(session, "ann/twice")

    with hub.reading() as session:
        assert session.exec(select(Attestation)).all() == []
        assert len(session.exec(select(RevisionFile)).all()) == 1
