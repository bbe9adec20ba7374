"""Who asks, and what they may.

On loopback a hub is open to everybody who reaches it; elsewhere it demands a token. Private models are shown to those
who have a token, here and there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, get_args

from fastapi import Depends, HTTPException, Request
from sqlmodel import col, select

from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Token
from modelgrove_hub.verbs.verb import Scope

COOKIE = "modelgrove_token"
SCOPES: frozenset[str] = frozenset(get_args(Scope))
_INCLUDED: dict[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "write": frozenset({"read", "write"}),
    "admin": SCOPES,
}


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
        HTTPException: 401, the token is not known or was revoked.
    """
    token = _token(request)
    if token is None:
        return Caller("anonymous", SCOPES if request.app.state.open else frozenset(), known=False)
    hub: Hub = request.app.state.hub
    with hub.reading() as session:
        query = select(Token).where(Token.hash == hash_of(token), col(Token.revoked_at).is_(None))
        found = session.exec(query).first()
    if found is None:
        raise HTTPException(401, "this token is not known here, or was revoked", {"WWW-Authenticate": "Bearer"})
    scopes = frozenset().union(*(_INCLUDED.get(scope, frozenset()) for scope in found.scopes))
    return Caller(found.name, scopes, known=True)


def hub_for(scope: Scope) -> Callable[..., Hub]:
    """A dependency: the hub as the caller sees it, if they may do what takes this scope.

    Raises:
        HTTPException: 401 without a token where one is needed, 403 with one that does not allow it.
    """

    def opened(request: Request, caller: Annotated[Caller, Depends(caller_of)]) -> Hub:
        if not caller.may(scope):
            if not caller.known:
                raise HTTPException(401, "this hub demands a token: `modelgrove token create`", _BEARER)
            raise HTTPException(403, f"token {caller.name!r} may not {scope} here")
        hub: Hub = request.app.state.hub
        return hub if caller.known else replace(hub, public_only=True)

    return opened


def hash_of(token: str) -> str:
    """What is kept of a token. Tokens are long and random, so a plain hash cannot be guessed back."""
    return hashlib.sha256(token.encode()).hexdigest()


_BEARER = {"WWW-Authenticate": "Bearer"}


def _token(request: Request) -> str | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return request.cookies.get(COOKIE)
