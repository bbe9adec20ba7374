"""Which requests a web page of somebody else may have sent: those are refused.

A browser sends them with our cookie, and from the machine on which an open hub trusts everybody. So the name by which
we are called must be ours (else any name can be pointed at 127.0.0.1, and the page that bears it may read our answers),
and what changes anything must come from our own pages or from no page at all.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from modelgrove_hub.api.problems import problem

_SAFE = ("GET", "HEAD", "OPTIONS")
_OURS = ("same-origin", "none")
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")
_ASKED_BY_MACHINES = ("/healthz", "/readyz")


class Origins:
    """Middleware: refuses what another site's page had a browser send.

    Args:
        app: what is behind.
        hosts: names by which we may be called; loopback's always are. None takes every name.
        is_open: no token is demanded, so nothing may come through a proxy.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, *, is_open: bool) -> None:
        self.app, self._is_open = app, is_open
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and (refused := self._refusal(scope)):
            status, detail = refused
            await problem(status, detail, Connection="close")(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if scope["path"] not in _ASKED_BY_MACHINES and not self._is_ours(_name(host)):
            return 421, f"this hub is not called {host[:80]!a}: name it in the setting `hosts` if it is"
        if self._is_open and any(name in headers for name in _FORWARDED):
            return 403, "this hub is open to its own machine, and a proxy sent this: set `trusted_proxies` for tokens"
        if b"authorization" in headers:
            return None  # no page of another site can set it
        site = headers.get(b"sec-fetch-site", b"").decode("latin-1")
        if scope["method"] in _SAFE:
            return None if not site or site in _OURS or _is_visit(headers) else _foreign("read")
        if site:
            return None if site in _OURS else _foreign("change")
        origin = headers.get(b"origin", b"").decode("latin-1")
        return None if not origin or urlsplit(origin).netloc.lower() == host.lower() else _foreign("change")

    def _is_ours(self, name: str) -> bool:
        return self._hosts is None or name in self._hosts or is_loopback(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine is called so."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _foreign(what: str) -> tuple[int, str]:
    return 403, f"a page of another site may not {what} anything here"


def _is_visit(headers: dict[bytes, bytes]) -> bool:
    # Someone followed a link to us: no script of the other site sees the page.
    return headers.get(b"sec-fetch-mode") == b"navigate" and headers.get(b"sec-fetch-dest") == b"document"


def _name(host: str) -> str:
    """The host without its port; nothing for what is no host."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
