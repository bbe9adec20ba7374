"""Events of jobs, from a real server; the test does what a worker would."""

import asyncio
import json
import threading
from contextlib import contextmanager
from uuid import uuid4

import httpx2
import pytest

from modelgrove_hub.api.events import Board
from modelgrove_hub.jobs import rows
from modelgrove_hub.tables import Job, now


@pytest.fixture
def submitted(server):
    """Makes a queued job."""

    def submit(target=None):
        job = Job(id=uuid4().hex, plugin="editor.test", idempotency_key=uuid4().hex, target=target)
        with server.hub.transaction() as session:
            session.add(job)
        return job.id

    return submit


@contextmanager
def listening(server, path, **headers):
    """Events as they come: (event, id, data)."""
    with httpx2.stream("GET", server.url + "/api/v1" + path, headers=headers, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield read(answer.iter_lines())


def read(lines):
    fields = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield fields["event"], fields["id"], json.loads(fields["data"])
            fields = {}


def change(server, job, **values):
    with server.hub.transaction() as session:
        row = session.get_one(Job, job)
        for name, value in values.items():
            setattr(row, name, value)


def end(server, job, **values):
    change(server, job, state="done", progress=1.0, finished_at=now(), **values)


def test_a_job_is_told_from_its_first_state_to_its_end(server, submitted):
    job = submitted()
    with listening(server, f"/jobs/{job}/events") as events:
        name, _, data = next(events)
        assert (name, data["state"], data["id"]) == ("state", "queued", job)
        change(server, job, state="running", log="begun\n")
        assert next(events)[2]["state"] == "running"
        assert next(events)[::2] == ("log", {"text": "begun\n"})
        change(server, job, progress=0.5, message="half", log="begun\nhälf\n")
        assert next(events)[::2] == ("progress", {"progress": 0.5, "message": "half"})
        assert next(events)[::2] == ("log", {"text": "hälf\n"})
        end(server, job, message="", log="begun\nhälf\nall\n")
        rest = list(events)
    assert [name for name, _, _ in rest] == ["state", "progress", "log", "end"]
    assert rest[-1][2]["state"] == "done"


def test_a_client_that_lost_its_connection_misses_nothing_and_gets_nothing_twice(server, submitted):
    job = submitted()
    change(server, job, state="running", log="one\n")
    with listening(server, f"/jobs/{job[:12]}/events") as events:
        last = [next(events), next(events)][-1][1]
    end(server, job, log="one\ntwo\n")
    with listening(server, f"/jobs/{job}/events", **{"Last-Event-ID": last}) as events:
        rest = list(events)
    assert [data["text"] for name, _, data in rest if name == "log"] == ["two\n"]
    again = httpx2.get(f"{server.url}/api/v1/jobs/{job}/events", headers={"Last-Event-ID": rest[-1][1]})
    assert again.status_code == 204
    assert httpx2.get(f"{server.url}/api/v1/jobs/nosuch/events").status_code == 404


def test_all_jobs_are_told_to_one_listener(server, submitted):
    with listening(server, "/jobs/events") as events:
        job = submitted("told/here")
        seen = next(event for event in events if event[2]["id"] == job)
        assert seen[0] == "job"
        end(server, job)
        assert next(event for event in events if event[2]["id"] == job)[2]["state"] == "done"


def test_many_listeners_cost_one_read_and_no_thread(server, submitted, monkeypatch):
    job, counted = submitted(), []
    board = Board(server.hub)
    monkeypatch.setattr(board, "_read", lambda *known: counted.append(known) or Board._read(board, *known))
    before = threading.active_count()

    async def listen():
        return [seen.facts.state async for seen in board.follow(job) if seen is not None][-1]

    async def all_of_them():
        tasks = [asyncio.create_task(listen()) for _ in range(300)]
        while not board._jobs:
            await asyncio.sleep(0.05)
        threads = threading.active_count() - before
        await asyncio.to_thread(end, server, job)
        return await asyncio.gather(*tasks), threads

    states, threads = asyncio.run(all_of_them())
    assert states == ["done"] * 300
    assert len(counted) < 20
    assert threads <= 3


def test_streams_end_at_once_when_the_server_stops(tmp_path, serving):
    served = serving.start(tmp_path / "hub")
    with httpx2.stream("GET", served.url + "/api/v1/jobs/events", timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": hello"
        served.process.terminate()
        assert "event" not in "".join(lines)
    assert served.process.wait(5) == 0 or served.process.returncode == -15
    serving.stop(served)


def test_one_address_has_so_many_streams_and_gets_its_places_back(server):
    with httpx2.Client(base_url=server.url, limits=httpx2.Limits(max_connections=200)) as client:
        open_ = []
        try:
            while len(open_) < 70:
                stream = client.stream("GET", "/api/v1/jobs/events")
                answer = stream.__enter__()
                open_.append(stream)
                if answer.status_code != 200:
                    break
            assert (answer.status_code, len(open_)) == (429, 65)
        finally:
            for stream in open_:
                stream.__exit__(None, None, None)
    assert rows.list_jobs(server.hub, limit=1)
