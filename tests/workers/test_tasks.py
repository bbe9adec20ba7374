"""One worker with nothing but a folder, and everything that can happen to its jobs."""

import psutil

from modelgrove_hub.jobs import rows


def supervisor_of(live):
    return live._running[0]


def test_a_job_is_done_and_told_about(live):
    job = live.await_end(live.submit("steady", "plain"))

    assert (job.state, job.attempts) == ("done", 1)
    assert f"job {job.id}: analyzer.steady, attempt 1" in live.log()


def test_the_same_key_twice_is_one_job_and_one_run(live):
    first, second = (live.submit("steady", "twice", seconds=0.2) for _ in range(2))
    live.await_end(first)

    assert first.id == second.id
    assert len(live.lines("twice", "begin")) == 1


def test_a_job_that_kills_its_worker_is_parked_after_exactly_three_attempts(live):
    poison = live.await_end(live.submit("poison", "poison"))

    assert (poison.state, poison.attempts) == ("failed", 3)
    assert poison.error.startswith("parked after 3 attempts")
    pids = live.lines("poison", "begin")
    assert len(pids) == len(set(pids)) == 3
    assert live.await_end(live.submit("steady", "after-poison")).state == "done"
    assert len(live.lines("poison", "begin")) == 3


def test_a_cancel_in_the_middle_stops_the_job(live, waiting):
    job = live.submit("steady", "cancelled", seconds=600)
    waiting(lambda: live.lines("cancelled", "begin"), "the job begins")
    rows.cancel(live.hub, job.id)

    assert live.await_end(job).state == "cancelled"
    assert live.lines("cancelled", "end") == []


def test_a_plugin_that_hangs_is_ended_with_its_process_after_a_cancel(live, waiting):
    job = live.submit("hanging", "hanging")
    waiting(lambda: live.lines("hanging", "begin"), "the job begins")
    rows.cancel(live.hub, job.id)

    assert live.await_end(job).state == "cancelled"
    assert live.await_end(live.submit("steady", "after-hanging")).state == "done"
    assert not psutil.pid_exists(live.lines("hanging", "begin")[0])
    assert len(live.lines("hanging", "begin")) == 1


def test_a_lost_message_is_sent_again(live, waiting):
    first = live.submit("steady", "first", seconds=3)
    waiting(lambda: live.lines("first", "begin"), "the worker is busy")
    second = live.submit("steady", "second")
    messages = list((live.hub.settings.queue / "messages").iterdir())
    assert len(messages) == 1
    messages[0].unlink()

    assert live.await_end(second).state == "done"
    assert live.await_end(first).state == "done"
    assert len(live.lines("second", "begin")) == 1


def test_a_storage_error_is_tried_again(live):
    job = live.await_end(live.submit("flaky", "flaky"))

    assert (job.state, job.attempts, job.error) == ("done", 3, None)
    assert len(live.lines("flaky", "begin")) == 3


def test_a_worker_that_crashes_is_started_again_by_its_supervisor(live, waiting):
    job = live.submit("steady", "crash", seconds=2)
    waiting(lambda: live.lines("crash", "begin"), "the job begins")
    supervisor_of(live).children()[0].kill()

    assert live.await_end(job).attempts == 2
    assert len(live.lines("crash", "end")) == 1
    assert "ended with -9; again in 1 s" in live.log()
