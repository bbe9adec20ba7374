"""Who asks, and what they may.

On loopback a hub is open to everybody who reaches it; elsewhere it demands a token. Private models are shown to those
who have a token, here and there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, HTTPException, Request, Response
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from sqlmodel import select
from starlette.concurrency import run_in_threadpool

from modelgrove_hub.api.limits import Failures, address_of
from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Token
from modelgrove_hub.verbs.tokens import ANONYMOUS, SCOPES, hash_of, state_of
from modelgrove_hub.verbs.verb import Scope

COOKIE = "modelgrove_token"
_INCLUDED: dict[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "write": frozenset({"read", "write"}),
    "admin": SCOPES,
}
_BEARER = {"WWW-Authenticate": "Bearer"}
_LONGEST = 512
_YEAR = 365 * 24 * 3600
bearer = HTTPBearer(auto_error=False, description="A token of `modelgrove token create`. An open hub needs none.")


@dataclass(frozen=True)
class Caller:
    """Who asks. `scopes` are what they may do; `known` callers showed a token, and see private models."""

    name: str
    scopes: frozenset[str]
    known: bool

    def may(self, scope: Scope) -> bool:
        """Whether they may do what takes this scope."""
        return scope in self.scopes


def caller_of(request: Request) -> Caller:
    """Who sent the request: by its token (header or cookie), or anybody.

    Raises:
        HTTPException: 401, the token is not known, was revoked or has expired; 429, it is one of too many such.
    """
    found: Caller | None = getattr(request.state, "caller", None)
    if found is None:
        token = _token(request)
        found = identify(request, token) if token is not None else _anonymous(request)
        request.state.caller = found
    return found


def identify(request: Request, token: str) -> Caller:
    """Whose token this is.

    A good token is always good; who shows others must wait longer and longer between them.

    Raises:
        HTTPException: 401, it is not known, was revoked or has expired; 429, it is one of too many such.
    """
    found = _find(request.app.state.hub, token)
    if found is not None:
        return found
    failures: Failures = request.app.state.failures
    wait = failures.note(address_of(request.scope))
    if wait:
        raise HTTPException(429, f"too many tokens that are not good: wait {wait} s", {"Retry-After": str(wait)})
    raise HTTPException(401, "this token is not known here, was revoked or has expired", _BEARER)


def hub_for(scope: Scope) -> Callable[..., Awaitable[Hub]]:
    """A dependency: the hub as the caller sees it, if they may do what takes this scope.

    Raises:
        HTTPException: 401 without a token where one is needed, 403 with one that does not allow it.
    """

    async def opened(request: Request, caller: Annotated[Caller, Depends(_caller)]) -> Hub:
        if not caller.may(scope):
            if not caller.known:
                raise HTTPException(401, "this hub demands a token: `modelgrove token create`", _BEARER)
            raise HTTPException(403, f"token {caller.name!r} may not {scope} here")
        hub: Hub = request.app.state.hub
        return hub if caller.known else replace(hub, public_only=True)

    return opened


def keep_token(response: Response, request: Request, token: str) -> None:
    """Have the browser show this token from now on: scripts cannot read it, other sites cannot use it."""
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, token, max_age=_YEAR, httponly=True, samesite="strict", secure=secure)


async def _caller(request: Request) -> Caller:
    # A thread costs more than the look at a request without a token.
    return caller_of(request) if _token(request) is None else await run_in_threadpool(caller_of, request)


def _anonymous(request: Request) -> Caller:
    return Caller(ANONYMOUS, SCOPES if request.app.state.open else frozenset(), known=False)


def _find(hub: Hub, token: str) -> Caller | None:
    if len(token) > _LONGEST:
        return None
    with hub.reading() as session:
        found = session.exec(select(Token).where(Token.hash == hash_of(token))).first()
    if found is None or state_of(found) != "good":
        return None
    scopes = frozenset().union(*(_INCLUDED.get(scope, frozenset()) for scope in found.scopes))
    return Caller(found.name, scopes, known=True)


def _token(request: Request) -> str | None:
    scheme, value = get_authorization_scheme_param(request.headers.get("authorization"))
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return request.cookies.get(COOKIE)


__all__ = ["COOKIE", "Caller", "bearer", "caller_of", "hash_of", "hub_for", "identify", "keep_token"]
