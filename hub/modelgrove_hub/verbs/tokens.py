"""Verbs of tokens: who may talk to the hub from elsewhere."""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import datetime
from typing import get_args

from pydantic import AwareDatetime, BaseModel, Field
from sqlmodel import Session, col, select

from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.database import take_turn
from modelgrove_hub.registry.events import record
from modelgrove_hub.tables import Token, now
from modelgrove_hub.verbs.facts import Facts
from modelgrove_hub.verbs.verb import Scope, verb

PREFIX = "modelgrove_"
"""How every token begins, so that people and scanners for leaked secrets know one when they see it."""
SCOPES: frozenset[str] = frozenset(get_args(Scope))
ANONYMOUS = "anonymous"
"""Who shows no token; no token is called so."""
_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class NewToken(BaseModel):
    """A token to make."""

    name: str = Field(
        description="Who or what has it; logs and events say it.", json_schema_extra={"pattern": f"^{_NAME.pattern}$"}
    )
    scope: Scope = Field("read", description="read looks, write also adds and gives work, admin does everything.")
    expires_at: AwareDatetime | None = Field(None, description="From when on it is good no more; unset, it lasts.")


class TokenFacts(Facts):
    """A token, without its secret."""

    name: str
    scopes: list[str]
    state: str
    """good, expired or revoked."""
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, token: Token) -> TokenFacts:
        """The facts of a row."""
        return cls.model_validate({**token.model_dump(), "state": state_of(token)})


class MadeToken(TokenFacts):
    """A token that was just made: the only time that its secret is said."""

    token: str


@verb("GET", "/tokens", "admin")
def list_tokens(hub: Hub) -> list[TokenFacts]:
    """All tokens by name, the revoked and expired ones too."""
    with hub.reading() as session:
        return [TokenFacts.of(token) for token in session.exec(select(Token).order_by(col(Token.name)))]


@verb("POST", "/tokens", "admin", 201)
def create_token(hub: Hub, *, token: NewToken) -> MadeToken:
    """Make a token. It is said once; the hub keeps its SHA-256 only.

    The name of a token that was revoked or has expired may be given again.

    Raises:
        UsageError: the name is not valid or reserved, or it would have expired already.
        ConflictError: there is a good token of that name.
    """
    if not _NAME.fullmatch(token.name):
        raise UsageError(f"token name {token.name[:80]!r}: write up to 64 letters, digits and . _ @ -")
    if token.name.lower() == ANONYMOUS:
        raise UsageError(f"a token cannot be called {token.name!r}: so are called those who have none")
    if token.expires_at is not None and token.expires_at <= now():
        raise UsageError(f"expires_at: {token.expires_at.isoformat()} is over already")
    secret = PREFIX + secrets.token_hex(_BYTES)
    with hub.transaction() as session:
        take_turn(session)
        known = _find(session, token.name)
        if known is not None:
            if state_of(known) == "good":
                raise ConflictError(f"there is a token {token.name!r}: revoke it first, or choose another name")
            session.delete(known)
            session.flush()
        row = Token(name=token.name, hash=hash_of(secret), scopes=[token.scope], expires_at=token.expires_at)
        session.add(row)
        end = token.expires_at.isoformat() if token.expires_at else None
        record(session, "token created", token.name, scope=token.scope, expires_at=end)
    return MadeToken(**TokenFacts.of(row).model_dump(), token=secret)


@verb("DELETE", "/tokens/{name}", "admin")
def revoke_token(hub: Hub, *, name: str) -> TokenFacts:
    """Have a token be good no more, from now on.

    Raises:
        NotFoundError: there is none of that name.
        ConflictError: it was revoked before.
    """
    with hub.transaction() as session:
        row = _find(session, name)
        if row is None:
            raise NotFoundError(f"no token {name!r}: `modelgrove token ls` lists them")
        if row.revoked_at is not None:
            raise ConflictError(f"token {name!r} was revoked on {row.revoked_at:%Y-%m-%d %H:%M}")
        row.revoked_at = now()
        session.add(row)
        record(session, "token revoked", name)
    return TokenFacts.of(row)


def hash_of(token: str) -> str:
    """What is kept of a token. Tokens are long and random, so a plain hash cannot be guessed back."""
    return hashlib.sha256(token.encode()).hexdigest()


def state_of(token: Token) -> str:
    """Whether it is good, expired or revoked."""
    if token.revoked_at is not None:
        return "revoked"
    return "expired" if token.expires_at is not None and token.expires_at <= now() else "good"


def _find(session: Session, name: str) -> Token | None:
    return session.exec(select(Token).where(Token.name == name)).first()
