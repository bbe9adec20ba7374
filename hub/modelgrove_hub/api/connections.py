"""Connections whose clients mean harm or have hung: bounds of headers, in bytes and time, which uvicorn leaves open."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_SECONDS = 20.0
_BYTES = 64 << 10
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    """uvicorn's connection: closed when headers take long to come, are too large, or when the server stops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._undecided = 0
        """Bytes that came since the parser last had headers or a part of a body: what it holds in memory."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Headers must come soon."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes in, unless headers (or trailers) grow too large."""
        self._undecided += len(data)
        super().data_received(data)
        if self._undecided > _BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        """A further request on the connection: its headers must come soon, too."""
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        """All headers are here."""
        self._undecided = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body is here."""
        self._undecided = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request is here."""
        self._undecided = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is expected."""
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: streams of events, which would never end, end now."""
        app: Any = self.cycle.scope.get("app") if self.cycle else None
        if app is not None:
            app.state.board.close()
        super().shutdown()

    def _expect_headers(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        with suppress(RuntimeError):
            self.transport.close()
