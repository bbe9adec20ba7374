"""One run of a job, for each way it can end."""

import threading
import time

import pytest
from sqlmodel import SQLModel, select, update

from modelgrove_hub.jobs import rows, run
from modelgrove_hub.jobs.run import run_job, run_local, sweep
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.models import find_revision
from modelgrove_hub.settings import Settings
from modelgrove_hub.tables import Blob, Edge, Job, Model

ON_BOTH = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def database_url(request):
    """SQLite, unless a test asks for both: rows are tested on both elsewhere."""
    return request.getfixturevalue(f"{getattr(request, 'param', 'sqlite')}_url")


@pytest.fixture
def counter(tmp_path):
    return tmp_path / "counter"


@pytest.fixture
def submit(hub, counter):
    def make(plugin, **params):
        return rows.submit(hub, plugin, {"counter": str(counter), **params})

    return make


def begun(counter):
    return [line.split()[0] for line in counter.read_text().splitlines()].count("begin")


def staging(hub):
    return list((hub.settings.home / "tmp").glob("*"))


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened in 20 s"
        time.sleep(0.02)


def test_a_job_ends_done_with_its_report_and_its_artefacts_kept(hub, submit, counter):
    seen = []
    job = run_local(hub, submit("steady", seconds=0.3).id, lambda done, message: seen.append((done, message)))

    assert (job.state, job.progress, job.attempts, job.error, job.owner) == ("done", 1.0, 1, None, None)
    assert job.outputs["report"]["seed"] < 2**48
    assert job.outputs["models"] == []
    sha = job.outputs["artefacts"]["plots/curve.txt"]
    assert hub.store.path(sha).read_text() == "up"
    with hub.transaction() as session:
        assert session.get(Blob, sha).size == 2
    assert "all well" in job.log
    assert seen[0][1] == "working"
    assert counter.read_text().count("end") == 1
    assert staging(hub) == []


@ON_BOTH
def test_two_jobs_with_the_same_artefact_share_its_blob(hub, counter):
    made = [rows.submit(hub, "steady", {"counter": str(counter)}, key=str(n)) for n in range(2)]
    first, second = (run_local(hub, job.id) for job in made)

    assert first.outputs["artefacts"] == second.outputs["artefacts"]


def test_the_seed_belongs_to_the_request(hub, counter):
    made = [rows.submit(hub, "steady", {"counter": str(counter)}, key=key) for key in ("a", "b")]
    first, second = (run_local(hub, job.id).outputs["report"]["seed"] for job in made)
    rows_of_first = rows.get(hub, made[0].id)
    with hub.transaction() as session:
        session.exec(update(Job).where(Job.id == rows_of_first.id).values(state="failed"))
    rows.retry(hub, rows_of_first.id)

    assert first != second
    assert run_local(hub, rows_of_first.id).outputs["report"]["seed"] == first


@pytest.fixture
def double(hub, register, submit, counter):
    """Submits a job that doubles a registered model, slowly if wanted."""
    SQLModel.metadata.create_all(hub.engine)
    revision = register("ann/flower", 1.5)

    def make(**params):
        return rows.submit(hub, "doubling", {"counter": str(counter), **params}, [revision.id], target="ann/twice")

    return make


def registered(hub):
    with hub.transaction() as session:
        return set(session.exec(select(Model.name)))


@ON_BOTH
def test_models_that_a_job_made_are_registered_with_their_parent_once(hub, double):
    from safetensors.torch import load_file

    job = run_local(hub, double().id)
    assert (job.state, job.error, job.outputs["models"]) == ("done", None, ["ann/twice"])
    assert run_local(hub, double().id).finished_at == job.finished_at, "the same request again is the same job"
    assert registered(hub) == {"ann/flower", "ann/twice"}
    with hub.transaction() as session:
        child, parent = (find_revision(session, name) for name in ("ann/twice", "ann/flower"))
        edges = session.exec(select(Edge)).all()
    assert [(edge.child_id, edge.parent_id, edge.relation) for edge in edges] == [(child.id, parent.id, "edit")]
    (path,) = load_input(hub, child.id).files().values()
    assert load_file(path)["weight"].tolist() == [[3.0] * 3] * 2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_output_that_is_not_finite_is_not_registered(hub, register, submit, counter, value):
    SQLModel.metadata.create_all(hub.engine)
    revision = register("ann/flower", value)

    job = run_local(hub, rows.submit(hub, "doubling", {"counter": str(counter)}, [revision.id]).id)

    assert job.state == "failed"
    assert "NaN or infinite values into 1 tensors, first 'weight'" in job.error
    assert registered(hub) == {"ann/flower"}
    assert staging(hub) == []


@pytest.mark.parametrize("trouble", ["fails", "is cancelled", "is taken back"])
def test_a_run_that_does_not_end_well_registers_nothing(hub, double, counter, trouble):
    job = double(seconds=20, fail=trouble == "fails")
    worker = threading.Thread(target=run_job, args=(hub, job.id, "me"))
    worker.start()
    wait_until(lambda: counter.exists())
    if trouble == "is cancelled":
        rows.cancel(hub, job.id)
    elif trouble == "is taken back":
        with hub.transaction() as session:
            session.exec(update(Job).values(owner="heir"))
    worker.join(20)

    assert registered(hub) == {"ann/flower"}
    assert rows.get(hub, job.id).outputs == {}
    assert staging(hub) == []


def test_a_job_is_not_run_by_two(hub, submit, counter):
    job = submit("steady", seconds=0.3)
    threads = [threading.Thread(target=run_job, args=(hub, job.id, f"worker {n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert begun(counter) == 1
    assert rows.get(hub, job.id).state == "done"
    assert run_job(hub, job.id, "late") is None


@pytest.mark.parametrize(
    ("plugin", "error", "traceback"),
    [
        ("raising", "plugin 'analyzer.raising' of 'stranger' failed: RuntimeError: two lines", True),
        ("exiting", "plugin 'analyzer.exiting' of 'stranger' failed: SystemExit: gone", True),
        ("damaged", "tensor 'a' is not there; there is 'b'", False),
        ("wrong", "plugin 'analyzer.wrong' returned a dict, not a Result", False),
        ("nan", "the report of plugin 'analyzer.nan' is not JSON: Out of range float values", False),
        ("escaping", "plugin 'analyzer.escaping' did not write '../temp/x'; it wrote real.safetensors", False),
        ("boastful", "plugin 'analyzer.boastful' did not write 'imagined.txt'; it wrote real.txt", False),
    ],
)
def test_a_plugin_that_fails_leaves_one_line(hub, submit, plugin, error, traceback):
    job = run_local(hub, submit(plugin).id)

    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error.startswith(error)
    assert "\n" not in job.error
    assert ("Traceback" in job.log) is traceback
    assert staging(hub) == []


def test_a_plugin_that_is_gone_when_the_job_runs_fails_it(hub, submit):
    job = submit("steady")
    with hub.transaction() as session:
        session.exec(update(Job).values(plugin="analyzer.stedy"))

    assert run_local(hub, job.id).error.startswith("no plugin 'analyzer.stedy'; near: analyzer.steady")


def test_a_storage_error_is_retried_with_patience(hub, submit, counter):
    job = submit("flaky")
    assert run_job(hub, job.id, "me") == "queued"
    waiting = rows.get(hub, job.id)
    assert (waiting.state, waiting.attempts, waiting.error) == ("queued", 1, "the disk is away")
    assert run_job(hub, job.id, "hasty") is None

    assert run_local(hub, job.id).state == "done"
    assert begun(counter) == 3


def test_a_full_disk_is_the_operators_matter_and_parked_in_the_end(hub, submit, counter):
    job = run_local(hub, submit("full").id)

    assert begun(counter) == hub.settings.max_attempts == 3
    assert (job.state, job.error) == ("failed", "parked after 3 attempts: OSError: [Errno 28] No space left on device")


@pytest.mark.parametrize("plugin", ["steady", "stubborn"])
def test_a_cancel_in_the_middle_ends_the_job(hub, submit, counter, plugin):
    job = submit(plugin, seconds=20)
    worker = threading.Thread(target=run_job, args=(hub, job.id, "me"))
    worker.start()
    wait_until(lambda: counter.exists())
    rows.cancel(hub, job.id)
    worker.join(20)

    found = rows.get(hub, job.id)
    assert (found.state, found.outputs, found.error) == ("cancelled", {}, None)
    assert found.finished_at
    assert staging(hub) == []


def test_a_plugin_that_hangs_after_a_cancel_is_reported(hub, submit, counter, monkeypatch):
    job, hung = submit("hanging"), threading.Event()
    worker = threading.Thread(target=run_job, args=(hub, job.id, "me"), kwargs={"on_hang": hung.set}, daemon=True)
    worker.start()
    wait_until(lambda: counter.exists())
    assert not hung.wait(hub.settings.lease_seconds * 2)
    rows.cancel(hub, job.id)

    assert hung.wait(20)
    # Let the thread end: the plugin's loop sleeps through this function.
    monkeypatch.setattr("stranger.time.sleep", lambda _: (_ for _ in ()).throw(SystemExit))
    worker.join(20)


@ON_BOTH
def test_a_run_whose_job_was_taken_back_writes_nothing(hub, submit, counter):
    job = submit("steady", seconds=3)
    states = []
    worker = threading.Thread(target=lambda: states.append(run_job(hub, job.id, "zombie")))
    worker.start()
    wait_until(lambda: counter.exists())
    with hub.transaction() as session:
        session.exec(update(Job).values(owner="heir"))
    worker.join(20)

    assert states == [None]
    assert "end" not in counter.read_text()
    found = rows.get(hub, job.id)
    assert (found.state, found.owner, found.outputs) == ("running", "heir", {})


@pytest.mark.parametrize(
    ("signal", "state", "attempts"), [(KeyboardInterrupt, "cancelled", 1), (run.Interrupted, "queued", 0)]
)
def test_an_interrupted_run_is_cancelled_at_the_terminal_and_given_back_in_a_worker(
    hub, submit, signal, state, attempts
):
    job = submit("steady", seconds=20)

    def interrupt(_done, _message):
        raise signal

    with pytest.raises(signal):
        run_job(hub, job.id, "me", on_progress=interrupt)
    found = rows.get(hub, job.id)
    assert (found.state, found.attempts) == (state, attempts)
    assert staging(hub) == []


def test_a_local_run_waits_for_the_worker_that_has_the_job(hub, submit, counter):
    job = submit("steady", seconds=0.5)
    worker = threading.Thread(target=run_job, args=(hub, job.id, "worker"))
    worker.start()
    wait_until(lambda: counter.exists())

    assert run_local(hub, job.id).state == "done"
    worker.join()
    assert begun(counter) == 1


def test_staging_of_dead_runs_is_swept_and_that_of_live_ones_is_not(hub, submit):
    job = submit("steady", seconds=0)
    for name in (f"{job.id}-1", "feedbeef-2"):
        (hub.settings.home / "tmp" / name / "out").mkdir(parents=True)
    with hub.transaction() as session:
        rows.claim(session, job.id, "me", 60)

    assert sweep(hub) == 1
    assert [folder.name for folder in staging(hub)] == [f"{job.id}-1"]


def test_an_unreachable_database_is_not_blamed_on_the_job(tmp_path, hub, submit):
    job = submit("steady")
    down = run.Hub.open(Settings(home=tmp_path / "x", database_url="postgresql://postgres@127.0.0.1:1/none"))

    with pytest.raises(run.StorageError):
        run_job(down, job.id, "me")
    assert run_job(hub, job.id, "me") == "done"
