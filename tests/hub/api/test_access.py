"""What callers without a token see of private models: nothing, in any answer."""

import re

import httpx2
import pytest

from modelgrove_hub.jobs import rows
from modelgrove_hub.registry.events import record
from modelgrove_hub.tables import Embedding, Job, Model

SECRET = "hidden/secret-thing"


@pytest.fixture(scope="module")
def private(server):
    """A private model, and a public one, with jobs and events of both."""
    for name, is_private in (("hidden/secret-thing", True), ("open/plain-thing", False)):
        owner, _, repo = name.partition("/")
        body = {"name": repo, "organization": owner, "type": "model", "private": is_private}
        assert httpx2.post(server.url + "/api/repos/create", json=body).status_code == 200
    with server.hub.transaction() as session:
        model = session.exec(Model.__table__.select().where(Model.name == SECRET)).one()
        revision = session.connection().exec_driver_sql(f"SELECT id FROM revision WHERE model_id = {model.id}").scalar()
        for key, job in {
            "input": {"inputs": [revision]}, "target": {"target": SECRET}, "log": {"log": f"wrote {SECRET}\n"},
            "report": {"outputs": {"report": {"near": [SECRET]}}}, "public": {"target": "open/made"},
        }.items():  # fmt: skip
            session.add(Job(id=f"{key:0<32}"[:32], plugin="editor.test", idempotency_key=key, **job))
        record(session, "looked", "open/plain-thing", beside=SECRET)
        session.add(Embedding(revision_id=revision, side="card", text_space="x", vector=b"\0" * 16))
    token = server.run("token", "create", "knows").strip()
    return {"Authorization": f"Bearer {token}"}


def paths(server):
    document = httpx2.get(server.url + "/api/v1/openapi.json").json()
    for path, item in document["paths"].items():
        if "get" in item and not path.endswith("/events"):
            named = SECRET if "{model}" in path else "input000" if "{job}" in path else "x"
            yield re.sub(r"{\w+}", named, path)


def test_no_answer_names_a_private_model_to_those_without_a_token(server, private):
    pages = ["/", "/jobs", "/system", f"/models/{SECRET}", "/atlas", "/api/models", f"/api/models/{SECRET}", "/metrics",
             f"/{SECRET}/resolve/main/README.md", "/jobs/input000", "/api/v1/search?text=secret-thing"]  # fmt: skip
    said = 0
    for path in (*paths(server), *pages):
        answer = httpx2.get(server.url + path, headers={"Accept": "text/html"} if path in pages else {}, timeout=60)
        body = answer.text.replace(f'"no model {SECRET!r}', "") if answer.status_code >= 400 else answer.text
        assert answer.status_code < 500, (path, answer.text)
        assert "secret-thing" not in body or answer.status_code == 404 or "search" in path, path
        said += httpx2.get(server.url + path, headers=private, timeout=60).text.count(SECRET) > 0
    assert said > 8, "with a token it is there"


def test_jobs_of_private_models_are_not_there(server, private):
    jobs = httpx2.get(server.url + "/api/v1/jobs").json()["items"]
    assert {job["idempotency_key"] for job in jobs} == {"public", "log"}, "a list holds no logs"
    for key in ("input", "target", "log", "report"):
        job = f"{key:0<32}"[:32]
        for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry")):
            assert httpx2.request(method, f"{server.url}/api/v1/jobs/{job}{path}").status_code == 404
        assert rows.get(server.hub, job).state == "queued"
        assert httpx2.get(f"{server.url}/api/v1/jobs/{job}", headers=private).status_code == 200
    assert httpx2.get(f"{server.url}/api/v1/jobs/public00").status_code == 200


def test_no_work_is_given_on_a_private_model_by_those_who_do_not_see_it(server, private):
    work = {"plugin": "analyzer.copies", "models": [SECRET]}
    assert httpx2.post(server.url + "/api/v1/jobs", json=work).status_code == 404
    assert httpx2.post(server.url + "/api/v1/models/remove", json={"models": [SECRET]}).status_code == 404
    assert httpx2.delete(server.url + f"/api/v1/models/{SECRET}").status_code == 404


def test_events_are_counted_and_those_of_private_models_left_out(server, private):
    seen = httpx2.get(server.url + "/api/v1/events").json()["items"]
    every = httpx2.get(server.url + "/api/v1/events", headers=private).json()["items"]
    assert {event["id"] for event in seen} < {event["id"] for event in every}
    assert "looked" not in {event["action"] for event in seen}
    assert [event["subject"] for event in seen if event["action"] == "created"] == ["open/plain-thing"]
