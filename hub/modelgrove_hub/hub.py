"""The open hub: settings, database and blob store in one object that everything is handed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlmodel import Session

from modelgrove_hub.registry.database import connect, reading, transaction
from modelgrove_hub.settings import Settings, settings
from modelgrove_hub.store.blobs import BlobStore


@dataclass(frozen=True)
class Hub:
    """A hub that is open: use `Hub.open()`, then `with hub.reading() as session` or `hub.transaction()` for rows."""

    settings: Settings
    engine: Engine
    store: BlobStore
    public_only: bool = False
    """Private models are not there: their names, files and vectors are not found by any query of `Model`."""

    @classmethod
    def open(cls, config: Settings | None = None) -> Hub:
        """Open the hub that the settings describe. The schema is checked by the commands that need it."""
        config = config or settings()
        return cls(config, connect(config.database), BlobStore(config.store))

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One database transaction: committed at the end, rolled back on any exception."""
        with transaction(self.engine, public_only=self.public_only) as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One database transaction that only reads, and so waits for no writer."""
        with reading(self.engine, public_only=self.public_only) as session:
            yield session
