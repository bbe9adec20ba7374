"""Signed strings: what a URL or token of ours says, with an end and a proof that we said it.

Clients put uploads to the URLs that they were given without showing their token again; the signature is the leave.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from functools import cache
from pathlib import Path

from fastapi import HTTPException

from modelgrove_hub.hub import Hub
from modelgrove_hub.store.disk import create_temporary, finish, make_folder, storage_errors

LASTS = 24 * 3600
"""Seconds: an upload of many gigabytes takes hours."""
_FILE = "service-secret"
_BYTES = 32


def sign(hub: Hub, said: str, lasts: int = LASTS) -> str:
    """`said` with the time until which it holds and the signature: three fields between dots."""
    text = f"{said}.{int(time.time()) + lasts}"
    return f"{text}.{_signature(hub, text)}"


def read_signed(hub: Hub, token: str) -> str:
    """What was signed.

    Raises:
        HTTPException: 403, it was not signed here, was changed, or its time is over.
    """
    text, _, signature = token.rpartition(".")
    said, _, end = text.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(hub, text).encode()):
        raise HTTPException(403, "this address was not given out by this hub")
    if int(end) < time.time():
        raise HTTPException(403, "this address has expired: begin the upload again")
    return said


def fingerprint(hub: Hub, text: str) -> str:
    """64 digits for `text` that only this hub can know."""
    return _signature(hub, f"fingerprint {text}")


def _signature(hub: Hub, text: str) -> str:
    return hmac.new(_secret(hub.settings.home), text.encode(), hashlib.sha256).hexdigest()


@cache
def _secret(home: Path) -> bytes:
    """The hub's own, the same for all of its processes; only its owner can read the file."""
    file = home / _FILE
    with storage_errors(file):
        make_folder(home)
        if not file.exists():
            draft, place = create_temporary(home, 0o600)
            draft.write(secrets.token_bytes(_BYTES))
            finish(draft)
            try:
                os.link(place, file)  # of two processes the first wins
            except FileExistsError:
                pass
            finally:
                place.unlink()
        return file.read_bytes()
