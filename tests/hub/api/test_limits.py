"""Limits by a clock of our own; that the server keeps them is in test_security.py."""

import anyio
import pytest
from fastapi import HTTPException

from modelgrove_hub.api import limits
from modelgrove_hub.api.limits import Failures, Places, Requests, address_of


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_failures_wait_twice_as_long_each_time_and_are_forgotten(clock):
    failures = Failures(clock)
    assert [failures.note("a") for _ in range(10)] == [0] * 10
    waits = []
    for _ in range(6):
        waits.append(failures.note("a"))
        clock.now += waits[-1]
        assert failures.note("a") == 0  # its turn came, and it failed again
    assert waits == [1, 2, 4, 8, 16, 32]
    assert failures.note("b") == 0
    for _ in range(12):
        clock.now += failures.note("a")
        failures.note("a")
    assert failures.note("a") == 3600
    clock.now += 8000
    assert [failures.note("a") for _ in range(10)] == [0] * 10


def test_requests_fill_up_again(clock):
    requests = Requests(5, clock)
    assert [requests.wait("a") for _ in range(10)] == [0] * 10
    assert requests.wait("a") == 1
    assert requests.wait("b") == 0
    clock.now += 0.2
    assert [requests.wait("a"), requests.wait("a")] == [0, 1]
    clock.now += 100
    assert [requests.wait("a") for _ in range(11)] == [0] * 10 + [1]
    assert [Requests(0, clock).wait("a") for _ in range(99)] == [0] * 99


def test_memory_is_bounded_however_many_addresses_ask(clock, monkeypatch):
    monkeypatch.setattr(limits, "_REMEMBERED", 100)
    requests = Requests(1, clock)
    for number in range(1000):
        requests.wait(f"10.0.0.{number}")
    assert len(requests._left._values) == 100


def test_places_are_given_back():
    places = Places(2)
    assert [places.take("a"), places.take("a"), places.take("a"), places.take("b")] == [True, True, False, True]
    places.leave("a")
    assert places.take("a")


def test_all_addresses_of_a_network_are_one_client():
    def of(host):
        return address_of({"client": (host, 1)})

    assert of("2001:db8:1:2:3::4") == of("2001:db8:1:2:ffff::") != of("2001:db8:1:3::")
    assert of("192.0.2.1") != of("192.0.2.2")
    assert of("testclient") == "testclient"
    assert address_of({"client": None}) == ""


class Route:
    body_field = None


def receive_all(messages, largest=10_000, route=None, pause=0.0, declared=0):
    body = limits._Body({"route": route, "headers": []}, None, largest, declared)
    left = iter(messages)

    async def receive():
        await anyio.sleep(pause)
        return {"type": "http.request", "body": next(left), "more_body": True}

    async def read():
        body._receive = receive
        for _ in messages:
            await body.receive()

    anyio.run(read)


def test_bodies_that_a_route_streams_may_be_larger(monkeypatch):
    monkeypatch.setattr(limits, "SMALL_BODY", 100)
    receive_all([b"x" * 1000] * 10, route=Route())
    with pytest.raises(HTTPException, match="413"):
        receive_all([b"x" * 1000] * 11, route=Route())
    with pytest.raises(HTTPException, match="413"):
        receive_all([b"x" * 60] * 2)
    with pytest.raises(HTTPException, match="413"):
        receive_all([b""], declared=101)


def test_a_body_that_stands_still_or_drips_is_given_up(monkeypatch):
    monkeypatch.setattr(limits, "PATIENCE", 0.05)
    with pytest.raises(HTTPException, match="408: the body stood still"):
        receive_all([b"x"], pause=5)
    with pytest.raises(HTTPException, match="408: the body comes more slowly"):
        receive_all([b"x"] * 100, pause=0.02)
