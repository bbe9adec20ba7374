"""The digest that identifies a revision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def digest_of(files: Mapping[str, str]) -> str:
    """The sha256 over sorted lines "path NUL sha256", one a file; `files` maps paths to sha256."""
    lines = "".join(f"{path}\0{files[path]}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
