"""A folder on this machine: files stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind
from modelgrove_hub.errors import StorageError, UsageError
from modelgrove_hub.ingest.discover import discover
from modelgrove_hub.ingest.offers import Offer, SourceParams, folder_of


class Folder:
    """Offers every model that lies in a folder."""

    name = "folder"
    kind: ClassVar[Kind] = Kind.SOURCE
    api = API
    summary = "Models in a folder of this machine, referenced where they lie."
    paper = ""

    class Params(SourceParams):
        """Where to look."""

        watch: bool = Field(True, description="With a schedule: run too when something changes.")

    def offers(self, context: Context, params: Params) -> Iterator[Offer]:  # noqa: ARG002
        """Every model at or below the folder; one that is being removed meanwhile is left to the next run."""
        top = folder_of(params.url)
        if not top.exists():
            raise StorageError(f"{top}: no such folder; is its disk mounted?")  # else all would be taken to be gone
        for found in discover(top):
            try:
                stamp = found.stamp if found.files else found.refused
                size = sum(file.stat().st_size for file in found.files.values()) if params.max_bytes else 0
            except OSError:
                continue
            yield Offer(found.key, stamp, found.name, size, found=found, refused=found.refused)

    def fetch(self, context: Context, offer: Offer, params: Params, folder: Path) -> Path:  # noqa: ARG002
        """Never asked: everything is here."""
        raise UsageError(f"{offer.key} lies on this machine")
