"""Every change of a job row, on SQLite and PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlmodel import select, update

from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.rows import Pulse
from modelgrove_hub.tables import Job, now


@pytest.fixture
def job(hub, tmp_path):
    return rows.submit(hub, "steady", {"counter": str(tmp_path / "counter")})


def claim(hub, job, owner="me", lease=30.0):
    with hub.transaction() as session:
        return rows.claim(session, job.id, owner, lease)


def do(hub, verb, job, owner="me", *args, **kwargs):
    with hub.transaction() as session:
        return verb(session, job.id, owner, *args, **kwargs)


def recover(hub, max_attempts=3):
    with hub.transaction() as session:
        return rows.recover(session, max_attempts)


def test_the_same_request_twice_is_one_job(hub, job, tmp_path):
    again = rows.submit(hub, "analyzer.steady", {"seconds": 0.0, "counter": str(tmp_path / "counter")})

    assert again.id == job.id
    assert len(rows.list_jobs(hub)) == 1


def test_other_parameters_or_another_target_are_another_job(hub, job, tmp_path):
    params = {"counter": str(tmp_path / "counter")}
    others = {
        rows.submit(hub, "steady", {**params, "seconds": 1}).id,
        rows.submit(hub, "steady", params, target="a").id,
    }

    assert len(others | {job.id}) == 3


def test_a_key_given_twice_at_the_same_moment_is_one_job(hub, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(rows.submit, hub, "steady", {"counter": str(tmp_path)}, key="mine") for _ in range(16)
        ]  # fmt: skip
        assert len({call.result().id for call in calls}) == 1


def test_a_key_that_belongs_to_another_request_is_a_conflict(hub, tmp_path):
    first = rows.submit(hub, "steady", {"counter": str(tmp_path)}, key="mine")

    with pytest.raises(ConflictError, match=f"'mine' belongs to job {first.id}, whose params"):
        rows.submit(hub, "steady", {"counter": str(tmp_path / "x")}, key="mine")


def test_submit_refuses_what_could_never_run(hub, tmp_path):
    with pytest.raises(NotFoundError, match=r"near: analyzer\.steady"):
        rows.submit(hub, "stedy")
    with pytest.raises(UsageError, match="parameter 'counter' is needed"):
        rows.submit(hub, "steady", {})
    with pytest.raises(NotFoundError, match="no revision with id 7"):
        rows.submit(hub, "steady", {"counter": str(tmp_path)}, [7])
    assert rows.list_jobs(hub) == []


def test_only_one_of_many_workers_claims_a_job(hub, job):
    with ThreadPoolExecutor(8) as pool:
        claims = [pool.submit(claim, hub, job, f"worker {n}") for n in range(16)]
        taken = [found for found in (call.result() for call in claims) if found]

    assert len(taken) == 1
    assert rows.get(hub, job.id).owner == taken[0].owner
    assert (taken[0].state, taken[0].attempts) == ("running", 1)


def test_a_job_is_not_claimed_before_its_time(hub, job):
    claim(hub, job)
    do(hub, rows.give_back, job, error="the disk is away", delay=60)

    assert claim(hub, job) is None
    assert rows.get(hub, job.id).state == "queued"


def test_a_beat_extends_the_lease_and_reports(hub, job):
    claim(hub, job, lease=-1)

    assert do(hub, rows.beat, job, "me", 30, "first\n", progress=0.5, message="half") is Pulse.ALIVE
    assert do(hub, rows.beat, job, "me", 30, "second\n") is Pulse.ALIVE
    found = rows.get(hub, job.id)
    assert (found.progress, found.message, found.log) == (0.5, "half", "first\nsecond\n")
    assert recover(hub) == 0


def test_who_lost_the_lease_changes_nothing(hub, job):
    claim(hub, job, "zombie", lease=-1)
    assert recover(hub) == 1
    claim(hub, job, "heir")

    assert do(hub, rows.beat, job, "zombie", 30, "x", progress=0.9) is Pulse.LOST
    for verb, *args in ((rows.finish, {}), (rows.fail, "no"), (rows.stop,), (rows.give_back,)):
        assert do(hub, verb, job, "zombie", *args) is False
    found = rows.get(hub, job.id)
    assert (found.state, found.owner, found.attempts, found.progress, found.log) == ("running", "heir", 2, 0.0, "")
    assert do(hub, rows.finish, job, "heir", {"models": []})


def test_a_silent_job_is_parked_when_its_attempts_are_used_up(hub, job):
    for _ in range(3):
        assert claim(hub, job, lease=-1)
        assert recover(hub) == 1

    found = rows.get(hub, job.id)
    assert (found.state, found.attempts) == ("failed", 3)
    assert "parked after 3 attempts" in found.error
    assert found.finished_at


def test_a_silent_job_that_was_to_be_cancelled_is_cancelled(hub, job):
    claim(hub, job, lease=-1)
    rows.cancel(hub, job.id)
    recover(hub)

    assert rows.get(hub, job.id).state == "cancelled"


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked(hub, job):
    claim(hub, job)
    assert rows.cancel(hub, job.id).state == "running"
    assert do(hub, rows.beat, job, "me", 30) is Pulse.CANCELLED
    assert do(hub, rows.stop, job)
    assert rows.cancel(hub, job.id).state == "cancelled"  # once more does no harm

    rows.retry(hub, job.id)
    cancelled = rows.cancel(hub, job.id)
    assert (cancelled.state, cancelled.finished_at is None) == ("cancelled", False)
    assert claim(hub, job) is None


def test_a_job_given_back_after_a_cancel_is_cancelled(hub, job):
    claim(hub, job)
    rows.cancel(hub, job.id)
    assert do(hub, rows.give_back, job)

    assert rows.get(hub, job.id).state == "cancelled"


def test_a_job_given_back_without_an_error_keeps_its_attempts(hub, job):
    claim(hub, job)
    do(hub, rows.give_back, job)

    assert (rows.get(hub, job.id).state, rows.get(hub, job.id).attempts) == ("queued", 0)


def test_what_is_over_cannot_be_cancelled_and_only_failures_are_retried(hub, job):
    with pytest.raises(ConflictError, match="is queued"):
        rows.retry(hub, job.id)
    claim(hub, job)
    do(hub, rows.finish, job, "me", {"report": {"a": 1}})
    with pytest.raises(ConflictError, match="already done"):
        rows.cancel(hub, job.id)
    with pytest.raises(ConflictError, match="is done"):
        rows.retry(hub, job.id)


@pytest.mark.parametrize("again", ["retry", "submit"])
def test_a_failed_job_starts_afresh_when_asked_for_again(hub, job, tmp_path, again):
    claim(hub, job)
    do(hub, rows.fail, job, "me", "no luck", "Traceback\n")
    if again == "retry":
        found = rows.retry(hub, job.id)
    else:
        found = rows.submit(hub, "steady", {"counter": str(tmp_path / "counter")})

    assert (found.id, found.state, found.attempts, found.error) == (job.id, "queued", 0, None)
    assert found.finished_at is None
    assert found.log == "Traceback\n"
    assert claim(hub, job).attempts == 1


def test_a_job_is_found_by_the_beginning_of_its_id(hub, job):
    assert rows.get(hub, job.id[:8]).id == job.id
    for reference in (job.id[:3], "%%%%", "nothing"):
        with pytest.raises(NotFoundError, match="modelgrove jobs ls"):
            rows.get(hub, reference)
    with hub.transaction() as session:
        for n in (1, 2):
            session.add(Job(id=f"same{n}", plugin="x", idempotency_key=f"k{n}"))
    with pytest.raises(UsageError, match="several jobs"):
        rows.get(hub, "same")


def test_jobs_are_listed_newest_first_and_by_state(hub, tmp_path):
    made = [rows.submit(hub, "steady", {"counter": str(tmp_path)}, key=str(n)) for n in range(3)]
    claim(hub, made[1])

    assert [found.id for found in rows.list_jobs(hub, limit=2)] == [made[2].id, made[1].id]
    assert [found.id for found in rows.list_jobs(hub, state="running")] == [made[1].id]


def test_times_in_rows_are_compared_in_utc(hub, job):
    with hub.transaction() as session:
        session.exec(update(Job).values(not_before=now() + timedelta(seconds=5)))
    assert claim(hub, job) is None
    with hub.transaction() as session:
        session.exec(update(Job).values(not_before=now() - timedelta(seconds=5)))
        assert session.exec(select(Job.id).where(Job.not_before < now())).all() == [job.id]
    assert claim(hub, job)
