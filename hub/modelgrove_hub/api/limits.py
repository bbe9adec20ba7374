"""How much one client may ask for: requests, tries of tokens, bodies, and how slowly they may come."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio
from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelgrove_hub.api.problems import problem

SMALL_BODY = 4 << 20
"""Bytes of the largest body that is read into memory before the caller is known."""
SLOWEST = 1024
"""Bytes a second, of bodies, over all the time that we waited for them."""
PATIENCE = 30.0
"""Seconds that a body may stand still, and before its rate counts."""
_REMEMBERED = 10_000
_FREE_FAILURES = 10
_LONGEST_WAIT = 3600
BUSY = {"Retry-After": "5"}
_CLOSE = {"Connection": "close"}
"""What follows on a connection whose body was not read to its end is no request."""

Value = TypeVar("Value")


class _Recent(Generic[Value]):
    """The values of the addresses that were seen last: memory stays bounded, whoever asks."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._values: OrderedDict[str, Value] = OrderedDict()

    def of(self, address: str) -> Value:
        if address not in self._values:
            self._values[address] = self._make()
            if len(self._values) > _REMEMBERED:
                self._values.popitem(last=False)
        self._values.move_to_end(address)
        return self._values[address]


class Failures:
    """Tokens that were not good, by address. After ten, each must wait twice as long as the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: _Recent[list[float]] = _Recent(lambda: [0, 0.0])

    def note(self, address: str) -> int:
        """Count one more; the seconds until the next would be looked at, 0 while this one was."""
        seen, moment = self._seen.of(address), self._clock()
        count, blocked_until = seen
        if moment < blocked_until:
            return math.ceil(blocked_until - moment)
        if moment - blocked_until > _LONGEST_WAIT:
            count = 0
        count += 1
        wait = min(_LONGEST_WAIT, 2 ** (count - _FREE_FAILURES)) if count >= _FREE_FAILURES else 0
        seen[:] = [count, moment + wait]
        return 0


class Requests:
    """A bucket of requests for each address: it fills at `rate` a second and holds `2 * rate`; 0 has no limit."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._left: _Recent[list[float]] = _Recent(lambda: [2 * rate, clock()])

    def wait(self, address: str) -> int:
        """Take one; the seconds to wait where there is none, else 0."""
        if not self._rate:
            return 0
        bucket, moment = self._left.of(address), self._clock()
        left = min(2 * self._rate, bucket[0] + (moment - bucket[1]) * self._rate)
        bucket[:] = [max(0.0, left - 1), moment]
        return 0 if left >= 1 else math.ceil((1 - left) / self._rate)


class Places:
    """How many things of a kind one address may have under way at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken: Counter[str] = Counter()

    def take(self, address: str) -> bool:
        """Take a place, if there is one; `leave` gives it back."""
        if self._taken[address] >= self.most:
            return False
        self._taken[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Give a place back."""
        self._taken[address] -= 1
        if not self._taken[address]:
            del self._taken[address]


class Limits:
    """Middleware: refuses requests that come too often, bodies that are too large, packed or too slow."""

    def __init__(self, app: ASGIApp, requests: Requests, uploads: Places, largest: int) -> None:
        self.app, self._requests, self._uploads, self._largest = app, requests, uploads, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        address = address_of(scope)
        if wait := self._requests.wait(address):
            refused = problem(429, "too many requests: ask more slowly", **{"Retry-After": str(wait)})
            await refused(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            # Unpacking it could take any amount of memory, and no client needs it.
            await problem(415, "send the body as it is, without Content-Encoding", **_CLOSE)(scope, receive, send)
            return
        body = _Body(scope, receive, self._largest, _declared(headers))
        if body.declared <= SMALL_BODY and b"transfer-encoding" not in headers:
            await self.app(scope, body.receive, send)
        elif self._uploads.take(address):
            try:
                await self.app(scope, body.receive, send)
            finally:
                self._uploads.leave(address)
        else:
            refused = problem(429, f"{self._uploads.most} uploads are under way already", **BUSY, **_CLOSE)
            await refused(scope, receive, send)


class _Body:
    """The body of a request, within its bounds."""

    def __init__(self, scope: Scope, receive: Receive, largest: int, declared: int) -> None:
        self._scope, self._receive, self._largest, self.declared = scope, receive, largest, declared
        self._bytes, self._waited, self._ended = 0, 0.0, False

    async def receive(self) -> Message:
        if self._ended:
            return await self._receive()  # waits for the client to leave
        self._check(self.declared)
        message = await self._in_time()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
            self._check(self._bytes)
        return message

    def _check(self, size: int) -> None:
        most = self._most()
        if size > most:
            raise HTTPException(413, f"the body has more than the {most} bytes that are taken here", _CLOSE)

    async def _in_time(self) -> Message:
        begun = time.monotonic()
        try:
            with anyio.fail_after(PATIENCE):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body stood still for {PATIENCE:.0f} s", _CLOSE) from None
        self._waited += time.monotonic() - begun
        if self._waited > PATIENCE and self._bytes < SLOWEST * self._waited:
            raise HTTPException(408, f"the body comes more slowly than {SLOWEST} bytes a second", _CLOSE)
        return message

    def _most(self) -> int:
        # Known once a route was chosen, which is before anything is read. What FastAPI parses it holds in memory, and
        # before it asks who calls; routes that stream look first who calls, and have bounds of their own.
        route: Any = self._scope.get("route")
        streams = route is not None and getattr(route, "body_field", None) is None and not self._is_form()
        return self._largest if streams else SMALL_BODY

    def _is_form(self) -> bool:
        kind: bytes = dict(self._scope["headers"]).get(b"content-type", b"").lower()
        return kind.startswith((b"application/x-www-form-urlencoded", b"multipart/form-data"))


def address_of(scope: Scope) -> str:
    """Whose limits count: the client's address, of IPv6 the network that one customer has."""
    client = scope.get("client")
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return str(client[0]) if client else ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _declared(headers: dict[bytes, bytes]) -> int:
    length = headers.get(b"content-length", b"")
    return int(length) if length.isdigit() and len(length) < 20 else 0
