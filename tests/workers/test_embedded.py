"""Workers that are killed and stopped: no job is lost and none is done twice."""

import signal
import sys
import time

import httpx2
import psutil
import pytest

from modelgrove_hub.jobs import rows
from modelgrove_hub.settings import Settings
from modelgrove_migrations.run import upgrade
from modelgrove_workers.embedded import Lane, core_count, environment


def test_a_job_whose_workers_are_all_killed_ends_done_once(grove, waiting):
    grove.start()
    job = grove.submit("steady", "victim", seconds=2.5)
    waiting(lambda: grove.lines("victim", "begin"), "the job begins")
    grove.kill()
    killed = time.monotonic()
    assert rows.get(grove.hub, job.id).state == "running", "killed in the middle"

    grove.start()
    waiting(lambda: len(grove.lines("victim", "begin")) == 2, "the job begins again")
    print(f"began again {time.monotonic() - killed:.1f} s after kill -9, start of the new worker included")  # noqa: T201
    job = grove.await_end(job)
    assert (job.state, job.attempts, job.error) == ("done", 2, None)
    assert len(grove.lines("victim", "begin")) == 2
    assert len(grove.lines("victim", "end")) == 1
    assert job.log.count("all well") == 1
    waiting(lambda: not list((grove.hub.settings.home / "tmp").iterdir()), "both staging folders are gone")


@pytest.fixture
def busy(live, waiting):
    """Starts a worker and a job, and returns them with the worker's processes when the job has begun."""

    def make(key, seconds):
        live.kill()
        supervisor = live.start()
        job = live.submit("steady", key, seconds=seconds)
        waiting(lambda: live.lines(key, "begin"), "the job begins")
        return supervisor, job, supervisor.children(recursive=True)

    return make


def test_a_stop_lets_a_short_job_finish(live, busy):
    supervisor, job, workers = busy("short", 1)
    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait(120) == 0
    assert psutil.wait_procs(workers, timeout=120)[1] == []
    assert rows.get(live.hub, job.id).state == "done"
    assert len(live.lines("short", "begin")) == 1


def test_a_second_signal_gives_a_long_job_back_without_using_up_an_attempt(live, busy, waiting):
    supervisor, job, workers = busy("long", 600)
    # Not SIGINT, which is ignored, here as in any program, when the tests were started with `nohup … &`.
    supervisor.send_signal(signal.SIGTERM)
    waiting(lambda: "Warm shutdown" in live.log().rpartition("Workers for")[2], "the first signal is passed on")
    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait(120) == 0
    assert psutil.wait_procs(workers, timeout=120)[1] == []
    found = rows.get(live.hub, job.id)
    assert (found.state, found.attempts, found.owner) == ("queued", 0, None)
    assert live.log().endswith("Stopped.\n")
    rows.cancel(live.hub, job.id)


def test_workers_of_a_killed_supervisor_finish_their_job_and_leave(live, busy):
    supervisor, job, workers = busy("orphan", 1)
    supervisor.kill()

    assert psutil.wait_procs(workers, timeout=120)[1] == []
    found = rows.get(live.hub, job.id)
    assert (found.state, found.attempts) == ("done", 1)


def test_up_serves_again_after_its_server_was_killed_and_stops_all(tmp_path, waiting):
    upgrade(Settings(home=tmp_path).database)
    command = [sys.executable, "-c", "from modelgrove_hub.cli.root import main; main()", "--home", str(tmp_path)]
    log = tmp_path / "up.log"
    with log.open("w") as written:
        process = psutil.Popen([*command, "up", "--port", "0", "--concurrency", "1"], stderr=written)
    try:
        waiting(lambda: " at http://" in log.read_text(), "it says where it is")
        url = log.read_text().partition(" at ")[2].split()[0]
        answer = httpx2.get(url + "/healthz", timeout=60)  # waits until the server is there
        assert answer.status_code == 200
        server = next(one for one in process.children() if "modelgrove_hub.api.server" in one.cmdline())
        server.kill()
        assert httpx2.get(url + "/healthz", timeout=60).status_code == 200
        children = process.children(recursive=True)
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert log.read_text().endswith("Stopped.\n")


def test_threads_are_shared_out_and_the_users_own_choice_is_kept(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    config = Settings(home=tmp_path, lease_seconds=7, hf_token="secret")

    assert environment(config, 1)["OMP_NUM_THREADS"] == str(core_count())
    assert environment(config, 64)["MKL_NUM_THREADS"] == "1"
    assert environment(config, 1)["MODELGROVE_LEASE_SECONDS"] == "7.0"
    assert "secret" not in environment(config, 1).values()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(config, 1)["OMP_NUM_THREADS"] == "3"


def test_a_lane_says_what_it_does():
    assert str(Lane(("preview", "io"), 2)) == "preview+io ×2"
