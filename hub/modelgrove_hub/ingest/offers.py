"""What a source plugin says: the models that it has, and which of them are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator

from modelgrove_hub.contracts import Params
from modelgrove_hub.errors import UsageError
from modelgrove_hub.ingest.discover import Found


@dataclass(frozen=True)
class Offer:
    """A model that a source has."""

    key: str
    """What it is called there: the same in every run."""
    stamp: str
    """The same as long as its content is: then nothing is fetched or read."""
    name: str
    """What the model may be called: "owner/name"."""
    size: int = 0
    """Bytes, as far as the source tells."""
    licence: str | None = None
    found: Found | None = None
    """Where it lies on this machine: it stays there, and `fetch` is not asked."""
    refused: str = ""
    """Why it cannot be had, if that is known already."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What `fetch` needs to know."""


class SourceParams(Params):
    """What every source has. `source`, `local` and `dry_run` are set by `modelgrove source run`."""

    url: str = Field(min_length=1, max_length=4096, description="The address.")
    source: str = Field("", description="Name of the source that this is a run of.")
    dry_run: bool = Field(False, description="Say what would happen; register nothing.")
    local: bool = Field(False, description="It was added on the hub's own machine, and may look at private addresses.")
    include: tuple[str, ...] = Field((), description="Only what is called so, as in me/*-lora; all if empty.")
    exclude: tuple[str, ...] = Field((), description="Nothing that is called so.")
    licences: tuple[str, ...] = Field((), description="Only models under these licences; all if empty.")
    families: tuple[str, ...] = Field((), description="Only models of these families; all if empty.")
    max_bytes: int = Field(0, ge=0, description="Nothing larger; 0 has no limit.")
    max_models: int = Field(0, ge=0, description="New or changed models taken in by one run; 0 has no limit.")

    @field_validator("include", "exclude", "licences", "families", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Several in one text are parted by commas."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def unwanted(offer: Offer, params: SourceParams) -> str:
    """Why the options leave an offer out, or nothing."""
    names = (offer.key, offer.name)
    if params.include and not any(fnmatch(name, pattern) for pattern in params.include for name in names):
        return "include"
    if any(fnmatch(name, pattern) for pattern in params.exclude for name in names):
        return "exclude"
    if params.max_bytes and offer.size > params.max_bytes:
        return "max_bytes"
    if params.licences and offer.found is None and offer.licence not in params.licences:
        return "licences"
    return ""


def folder_of(url: str) -> Path:
    """The folder that a path or file:// address names.

    Raises:
        UsageError: it is another kind of address, or not absolute.
    """
    parts = urlsplit(url)
    path = Path(unquote(parts.path)) if parts.scheme == "file" else Path(url)
    if parts.scheme not in ("", "file") or not path.is_absolute():
        raise UsageError(f"{url}: write an absolute path, as in /srv/models or file:///srv/models")
    return path
