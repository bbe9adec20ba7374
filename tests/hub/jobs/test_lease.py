"""The hold on a running job."""

import time

import pytest

from modelgrove_hub.contracts import Cancelled
from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.lease import Lease, LostLease
from modelgrove_hub.jobs.rows import Pulse
from modelgrove_hub.settings import Settings


@pytest.fixture
def job(hub, tmp_path):
    made = rows.submit(hub, "steady", {"counter": str(tmp_path)})
    with hub.transaction() as session:
        return rows.claim(session, made.id, "me", hub.settings.lease_seconds)


def recover(hub):
    with hub.transaction() as session:
        return rows.recover(session, 3)


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened in 20 s"
        time.sleep(0.02)


def test_a_held_job_is_not_taken_back_and_a_dropped_one_is(hub, job):
    with Lease(hub, job.id, "me"):
        first = rows.get(hub, job.id).lease_until
        wait_until(lambda: rows.get(hub, job.id).lease_until > first)
        assert recover(hub) == 0
    wait_until(lambda: recover(hub) == 1)


def test_the_hold_learns_of_a_cancel_and_of_a_loss(hub, job):
    with Lease(hub, job.id, "me") as lease:
        lease.check()
        rows.cancel(hub, job.id)
        wait_until(lambda: lease.pulse is Pulse.CANCELLED)
        with pytest.raises(Cancelled, match="was cancelled"):
            lease.check()
        with hub.transaction() as session:
            rows.stop(session, job.id, "me")
        wait_until(lambda: lease.pulse is Pulse.LOST)
        with pytest.raises(LostLease, match="was taken back"):
            lease.check()


def test_a_database_that_is_away_for_a_while_does_not_end_the_hold(hub, job, tmp_path, caplog):
    away = Hub.open(Settings(home=tmp_path, database_url="postgresql://postgres@127.0.0.1:1/none"))
    with Lease(hub, job.id, "me") as lease:
        lease._hub = away
        wait_until(lambda: "no heartbeat: database" in caplog.text)
        lease.check()
        lease._hub = hub
        before = rows.get(hub, job.id).lease_until
        wait_until(lambda: rows.get(hub, job.id).lease_until > before)
    assert lease.pulse is Pulse.ALIVE
