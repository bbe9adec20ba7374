"""Idempotency keys, on a real server."""

from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from modelgrove_hub.jobs import rows
from modelgrove_hub.tables import GivenAnswer


@pytest.fixture(scope="module")
def work(server):
    """A job that no worker does: this hub has none."""
    plugin = "analyzer.copies"
    return {"plugin": plugin, "params": {}, "models": []}


def post(server, body, key, token=None, path="/jobs"):
    headers = {"Idempotency-Key": key, **({"Authorization": f"Bearer {token}"} if token else {})}
    return httpx2.post(f"{server.url}/api/v1{path}", json=body, headers=headers)


def test_the_same_key_is_the_same_answer(server, work):
    first = post(server, {**work, "target": "a/one"}, "k1")
    assert first.status_code == 202
    assert first.headers["location"] == f"/api/v1/jobs/{first.json()['id']}"
    rows.cancel(server.hub, first.json()["id"])
    again = post(server, {**work, "target": "a/one"}, "k1")
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert rows.get(server.hub, first.json()["id"]).state == "cancelled", "nothing was done again"


def test_another_request_with_the_key_is_a_conflict(server, work):
    assert post(server, {**work, "target": "a/two"}, "k2").status_code == 202
    assert post(server, {**work, "target": "a/three"}, "k2").status_code == 409
    job = rows.list_jobs(server.hub, limit=1)[0].id
    assert post(server, {}, "k2", path=f"/jobs/{job}/retry").status_code == 409


def test_what_failed_may_be_sent_again_corrected(server, work):
    assert post(server, {**work, "plugin": "no.such"}, "k3").status_code == 404
    assert post(server, {**work, "target": "a/four"}, "k3").status_code == 202


def test_of_many_at_once_there_is_one_job(server, work):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(server, {**work, "target": "a/five"}, "k5"), range(16)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_callers_do_not_see_each_others_keys(guarded, tokens, work):
    first = post(guarded, {**work, "target": "a/six"}, "k6", tokens["write"])
    other = post(guarded, {**work, "target": "a/seven"}, "k6", tokens["admin"])
    assert (first.status_code, other.status_code) == (202, 202)
    assert first.json()["id"] != other.json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 201, "a b", "schlüssel".encode()])
def test_keys_that_cannot_be_are_refused(server, work, key):
    assert post(server, work, key).status_code == 422


def test_a_token_is_never_kept_as_an_answer(guarded, tokens):
    made = post(guarded, {"name": "kept"}, "k7", tokens["admin"], path="/tokens")
    assert made.status_code == 201
    with guarded.hub.reading() as session:
        assert session.get(GivenAnswer, ("admin", "k7")) is None
