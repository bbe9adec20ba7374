"""Runs the application with uvicorn; `python -m modelgrove_hub.api.server FD PLACE` on a socket that it is given."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import signal
import socket
import ssl
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from modelgrove_hub.api.origins import is_loopback
from modelgrove_hub.errors import ConflictError, StorageError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings

GRACE_SECONDS = 10
_BACKLOG = 2048
_CONNECTIONS = 2000
_PLACE = "MODELGROVE_SERVER_PLACE"
_PR_SET_PDEATHSIG = 1
_METRICS = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True)
class Place:
    """Where a server listens, and how."""

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None
    workers: int = 1

    def is_open(self, config: Settings) -> bool:
        """Whether no token is demanded: only this machine reaches it, and nobody else is spoken for."""
        return is_loopback(self.host) and not config.hosts and not config.trusted_proxies

    def url(self, listener: socket.socket) -> str:
        """The address for a browser."""
        host, port = listener.getsockname()[:2]
        return f"{'https' if self.certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def listen(place: Place) -> socket.socket:
    """Take the address: connections wait from now on until `serve` answers them.

    Raises:
        ConflictError: something listens there already.
        UsageError: it is no address of this machine, may not be taken, or certificate and key do not fit.
        StorageError: the system refuses.
    """
    if place.certificate:
        _check_certificate(place)
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"--host {place.host!r} is no address: {error.strerror or error}") from error
    # Of the two that "localhost" means, clients try IPv4.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(place, error) from error
    return listener


def serve(hub: Hub, place: Place, listener: socket.socket) -> None:
    """Answer on the socket until SIGTERM or SIGINT.

    Downloads under way then get ten seconds to finish; streams of events end at once.
    """
    if place.workers == 1:
        _run(_config(_application(hub, place), hub.settings, place), listener)
        return
    with tempfile.TemporaryDirectory(prefix="modelgrove-metrics-") as folder:
        os.environ |= {_METRICS: folder, _PLACE: json.dumps(asdict(place))}
        Multiprocess(_config(f"{__name__}:application", hub.settings, place), [listener]).run()


def application() -> FastAPI:
    """The application of one of several processes, whose parent left the place in the environment."""
    return _application(Hub.open(), Place(**json.loads(os.environ[_PLACE])))


def _run(config: uvicorn.Config, listener: socket.socket) -> None:
    uvicorn.Server(config).run([listener])


def _application(hub: Hub, place: Place) -> FastAPI:
    from modelgrove_hub.api.app import create_app

    prepare_log(hub.settings)
    return create_app(hub, open_to_all=place.is_open(hub.settings))


def prepare_log(config: Settings) -> None:
    """Have warnings written to stderr, and requests as the setting `request_log` says."""
    from modelgrove_hub.api.watching import LOG, JsonLines, TextLines

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    LOG.handlers.clear()
    LOG.propagate = False
    if config.request_log == "off":
        LOG.setLevel(logging.WARNING)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if config.request_log == "json" else TextLines())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)


def _config(app: FastAPI | str, config: Settings, place: Place) -> uvicorn.Config:
    from modelgrove_hub.api.connections import Connection

    return uvicorn.Config(
        app, factory=isinstance(app, str), workers=place.workers, http=Connection, ws="none", log_level="warning",
        access_log=False, server_header=False, backlog=_BACKLOG, limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS, ssl_certfile=place.certificate, ssl_keyfile=place.key,
        proxy_headers=bool(config.trusted_proxies), forwarded_allow_ips=config.trusted_proxies or [],
    )  # fmt: skip


def _check_certificate(place: Place) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(str(place.certificate), place.key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--tls-cert {place.certificate}, --tls-key {place.key}: {error}") from error


def _refused(place: Place, error: OSError) -> ConflictError | UsageError | StorageError:
    where = f"{place.host}:{place.port}"
    if error.errno == errno.EADDRINUSE:
        return ConflictError(f"{where} is in use: stop what listens there, or give another --port (0 takes a free one)")
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"{where} is no address of this machine: --host 0.0.0.0 listens on all it has")
    if error.errno == errno.EACCES:
        return UsageError(f"{where} may not be taken by this user: choose a --port above 1023")
    return StorageError(f"{where}: {error.strerror or error}")


def _main(descriptor: str, place: str) -> None:
    if sys.platform == "linux":  # stop when the supervisor is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    with socket.socket(fileno=int(descriptor)) as listener:
        serve(Hub.open(), Place(**json.loads(place)), listener)


if __name__ == "__main__":
    arguments: list[Any] = sys.argv[1:]
    _main(*arguments)
