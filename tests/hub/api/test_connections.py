"""Clients that send their headers slowly: a server of this process, with little patience."""

import socket
import threading
import time

import pytest
import uvicorn

from modelgrove_hub.api import connections


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(connections, "_SECONDS", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=connections.Connection, ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()
    listener.close()


def read(connection):
    said = b""
    while more := connection.recv(1000):
        said += more
    return said


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /"])
def test_headers_that_never_end_are_given_up(address, begun):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(begun)
        said = read(connection)
    assert said.startswith(b"HTTP/1.1 200") == (begun.count(b"GET") == 2)


def test_dripping_does_not_help(address):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for number in range(1000):
                connection.sendall(b"X-%d: a\r\n" % number)
                time.sleep(0.01)


def test_a_slow_answer_is_no_slow_header(address):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert read(connection).endswith(b"ok")


def test_large_headers_are_answered(address):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 65_000)
        connection.sendall(b"a" * 1000)
        assert read(connection).startswith(b"HTTP/1.1 431")
