"""Verbs of keys: secrets of marks. The secret stays in a file where the hub is; only its commitment is told."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

from pydantic import BaseModel, Field

from modelgrove_hub import keys
from modelgrove_hub.hub import Hub
from modelgrove_hub.verbs.facts import Facts
from modelgrove_hub.verbs.verb import verb


class KeyFacts(Facts):
    """A key as everybody may know it."""

    name: str
    id: str
    """The commitment: SHA-256 of the secret."""
    bits: int
    committed_at: datetime
    event: int
    """Number of the event that holds the commitment."""
    secret_file: str
    here: bool
    """Whether the secret is on the machine of the hub."""


class NewKey(BaseModel):
    """A key to make."""

    name: str
    bits: int = Field(keys.BITS, ge=20, le=512, description="Bits that are read with it.")


@verb("GET", "/keys")
def list_keys(hub: Hub) -> list[KeyFacts]:
    """Keys, oldest first."""
    with hub.reading() as session:
        return [_facts(hub, found) for found in keys.list_keys(session)]


@verb("GET", "/keys/{key}")
def show_key(hub: Hub, *, key: str) -> KeyFacts:
    """A key, by its name or the beginning of its commitment.

    Raises:
        NotFoundError: there is none.
        UsageError: the beginning fits several.
    """
    with hub.reading() as session:
        return _facts(hub, keys.find_key(session, key))


@verb("POST", "/keys", "admin", 201)
def new_key(hub: Hub, *, wanted: NewKey) -> KeyFacts:
    """Draw a secret, keep it in a file of the hub's, and commit to it in the event log.

    Raises:
        UsageError: the name could be taken for a commitment, or is empty.
        ConflictError: a key is called so.
    """
    with hub.transaction() as session:
        return _facts(hub, keys.new_key(session, hub.settings, wanted.name, wanted.bits))


def _facts(hub: Hub, found: keys.CommittedKey) -> KeyFacts:
    place = keys.secret_file(hub.settings, found.id)
    return KeyFacts(**asdict(found), secret_file=str(place), here=place.is_file())
