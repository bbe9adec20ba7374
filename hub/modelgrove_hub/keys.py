"""Secret keys of marks: 256 random bits in a file of their owner's, and a commitment to them in the event log.

A test that finds a key's mark is exact only if the key was drawn before it saw the weights. So a key is named by its
commitment, SHA-256 of the secret, and that is written to the event log when the key is made. Nobody can tell the secret
from it, and nobody can put another secret in its place. The secret is in no database, log or job: whoever works with it
reads it from the home's folder `keys`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlmodel import Session, col, func, or_, select

from modelgrove_hub.errors import ConflictError, DataError, NotFoundError, UsageError
from modelgrove_hub.registry.database import take_turn
from modelgrove_hub.registry.events import record
from modelgrove_hub.settings import Settings
from modelgrove_hub.store.disk import storage_errors
from modelgrove_hub.tables import Event, Revision

SECRET_BYTES = 32
BITS = 128
"""A perfect match of 128 bits is exact to 10⁻³⁸; with a million users 103 of them are still enough for 10⁻⁶."""
_ACTION = "key committed"
_DOMAIN = b"modelgrove key 1\0"
_SHORTEST = 4


@dataclass(frozen=True)
class CommittedKey:
    """A key as everybody may know it."""

    name: str
    id: str
    """The commitment: SHA-256 of the secret, 64 hexadecimal digits."""
    bits: int
    """How many bits are read with it: committed as well, so that nobody picks the number that suits."""
    committed_at: datetime
    event: int


def key_id(secret: bytes) -> str:
    """The commitment to a secret."""
    return hashlib.sha256(_DOMAIN + secret).hexdigest()


def new_key(session: Session, config: Settings, name: str, bits: int = BITS) -> CommittedKey:
    """Draw a secret, keep it in a file that only its owner can read, and commit to it in the event log.

    Raises:
        UsageError: the name could be taken for a commitment, or is empty.
        ConflictError: a key is called so.
        StorageError: the file cannot be written.
    """
    if not name.strip() or _looks_like_id(name):
        raise UsageError(f"a key cannot be called {name!r}: give a name that is no row of hexadecimal digits")
    take_turn(session)  # two of one name cannot be made at once
    if any(key.name == name for key in list_keys(session)):
        raise ConflictError(f"a key is called {name!r} already: see `modelgrove key show {name}`")
    secret = secrets.token_bytes(SECRET_BYTES)
    public = key_id(secret)
    place = secret_file(config, public)
    with storage_errors(place):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    return _key(record(session, _ACTION, public, name=name, bits=bits))


def list_keys(session: Session) -> list[CommittedKey]:
    """All keys that were committed here, oldest first."""
    found = session.exec(select(Event).where(Event.action == _ACTION).order_by(col(Event.id)))
    return [_key(event) for event in found]


def find_key(session: Session, ref: str) -> CommittedKey:
    """The key of that name, or whose commitment begins so.

    Raises:
        NotFoundError: none was committed here.
        UsageError: several begin so.
    """
    keys = list_keys(session)
    found = [key for key in keys if key.name == ref] or [
        key for key in keys if _looks_like_id(ref) and key.id.startswith(ref.lower())
    ]
    if len(found) > 1:
        raise UsageError(f"{len(found)} keys begin with {ref}: {', '.join(key.name for key in found)}")
    if not found:
        known = ", ".join(key.name for key in keys) or "none: `modelgrove key new NAME` makes one"
        raise NotFoundError(f"no key {ref!r} was committed here; there is {known}")
    return found[0]


def read_secret(config: Settings, key: CommittedKey) -> bytes:
    """The secret, from the file of its owner.

    Raises:
        NotFoundError: the file is not on this machine.
        DataError: it does not hold the secret that was committed to.
    """
    place = secret_file(config, key.id)
    try:
        text = place.read_text("ascii")
    except FileNotFoundError:
        raise NotFoundError(f"the secret of key {key.name} is not on this machine: it belongs into {place}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: {error}") from None
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        raise DataError(f"{place} does not hold a secret in hexadecimal digits") from None
    if key_id(secret) != key.id:
        raise DataError(f"{place} holds another secret than key {key.name} committed to")
    return secret


def secret_file(config: Settings, public: str) -> Path:
    """Where the secret of a commitment lies."""
    return config.home.absolute() / "keys" / f"{public}.key"


def registered_at(session: Session, revision_id: int) -> datetime | None:
    """When what a revision holds was first registered here, under any name; None if it is not.

    Otherwise a model would become younger than a key by being registered again.
    """
    revision = session.get(Revision, revision_id)
    if revision is None:
        return None
    same = [Revision.digest == revision.digest]
    if revision.values_hash is not None:
        same.append(Revision.values_hash == revision.values_hash)
    return session.exec(select(func.min(Revision.created_at)).where(or_(*same))).one()


def _looks_like_id(text: str) -> bool:
    return len(text) >= _SHORTEST and set(text.lower()) <= set("0123456789abcdef")


def _key(event: Event) -> CommittedKey:
    return CommittedKey(event.detail["name"], event.subject, event.detail["bits"], event.at, event.id or 0)
