"""The outbox: told once, told again when the message is lost, never told for nothing."""

from datetime import timedelta

import pytest
from sqlmodel import update

from modelgrove_hub.errors import StorageError
from modelgrove_hub.jobs import dispatch, rows
from modelgrove_hub.jobs.dispatch import publish, publish_due
from modelgrove_hub.tables import Job, now


class Post:
    """A broker in memory; `down` makes it fail as one that does not answer."""

    def __init__(self):
        self.sent, self.down = [], False

    def publish(self, job_id, queue):
        if self.down:
            raise StorageError("broker is down")
        self.sent.append((queue, job_id))

    def waiting(self, queue):
        if self.down:
            raise StorageError("broker is down")
        return sum(name == queue for name, _ in self.sent)


@pytest.fixture
def post(monkeypatch):
    broker = Post()
    monkeypatch.setattr(dispatch, "dispatcher", lambda _config: broker)
    return broker


@pytest.fixture
def submit(hub, tmp_path):
    return lambda key="a", **options: rows.submit(hub, "steady", {"counter": str(tmp_path)}, key=key, **options)


def age(hub, job, seconds):
    """Pretend that the job was published so long ago."""
    with hub.transaction() as session:
        session.exec(update(Job).where(Job.id == job.id).values(published_at=now() - timedelta(seconds=seconds)))


def test_a_job_is_told_once_however_often_it_is_submitted(hub, post, submit):
    assert publish(hub, submit()) is True
    assert publish(hub, submit()) is False
    assert publish_due(hub) == 0
    assert [queue for queue, _ in post.sent] == ["cpu"]


def test_a_broker_that_is_down_loses_nothing(hub, post, submit, caplog):
    post.down = True
    job = submit()
    assert publish(hub, job) is False
    assert publish_due(hub) == 0
    assert "its message was not sent: broker is down" in caplog.text

    post.down = False
    assert publish_due(hub) == 1
    assert post.sent == [("cpu", job.id)]


def test_a_missing_dispatcher_is_logged_and_the_job_waits(hub, submit, caplog, monkeypatch):
    dispatch.dispatcher.cache_clear()
    monkeypatch.setattr(dispatch, "NAME", "pigeon")

    assert publish(hub, submit()) is False
    assert "no dispatcher 'pigeon' is installed" in caplog.text
    assert rows.list_jobs(hub)[0].published_at is None
    dispatch.dispatcher.cache_clear()


def test_a_job_with_a_delay_is_told_when_its_time_comes(hub, post, submit):
    job = submit()
    with hub.transaction() as session:
        session.exec(update(Job).values(not_before=now() + timedelta(seconds=60)))
    assert publish_due(hub) == 0
    with hub.transaction() as session:
        session.exec(update(Job).values(not_before=now()))
    assert publish_due(hub) == 1
    assert post.sent == [("cpu", job.id)]


def test_a_lost_message_is_told_again_when_the_queue_is_empty(hub, post, submit):
    job = submit()
    publish(hub, job)
    post.sent.clear()
    assert publish_due(hub) == 0, "too early to call it lost"

    age(hub, job, 60)
    assert publish_due(hub) == 1
    assert publish_due(hub) == 0
    assert post.sent == [("cpu", job.id)]


def test_a_message_that_still_waits_in_a_long_queue_is_not_told_again(hub, post, submit):
    jobs = [submit(str(n)) for n in range(5)]
    for job in jobs:
        publish(hub, job)
        age(hub, job, 3600)

    assert publish_due(hub) == 0
    assert len(post.sent) == 5


def test_a_message_that_was_overtaken_is_told_again_though_others_wait(hub, post, submit):
    lost, taken, waiting = (submit(key) for key in ("lost", "taken", "waiting"))
    for job, seconds in ((lost, 90), (taken, 60), (waiting, 30)):
        publish(hub, job)
        age(hub, job, seconds)
    with hub.transaction() as session:
        rows.claim(session, taken.id, "me", 60)

    assert publish_due(hub) == 1
    assert post.sent[3:] == [("cpu", lost.id)]
    assert publish_due(hub) == 0


def test_queues_do_not_overtake_each_other(hub, post, submit):
    slow, quick = submit("slow"), submit("quick", queue="preview")
    for job, seconds in ((slow, 90), (quick, 60)):
        publish(hub, job)
        age(hub, job, seconds)
    with hub.transaction() as session:
        rows.claim(session, quick.id, "me", 60)

    assert publish_due(hub) == 0


def test_a_cancelled_or_running_job_is_never_told(hub, post, submit):
    cancelled, running = submit("cancelled"), submit("running")
    rows.cancel(hub, cancelled.id)
    with hub.transaction() as session:
        rows.claim(session, running.id, "me", 60)

    assert (publish(hub, cancelled), publish(hub, running), publish_due(hub)) == (False, False, 0)
