"""What a plugin gets while it runs: inputs, an output folder, progress, log, random numbers."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import InputModel, TensorWriter
from modelgrove_hub.errors import PluginError, StorageError
from modelgrove_hub.jobs.lease import Lease
from modelgrove_hub.store.disk import output_place

if TYPE_CHECKING:
    from torch import Generator

LOG = logging.getLogger(__name__)
LOG_LIMIT = 256 * 1024
_FULL = "the log is full; nothing more is kept of this attempt\n"
_SECONDS_BETWEEN_WRITES = 0.2
_MESSAGE_LIMIT = 300
_SEED_BYTES = 6  # recipes travel as JSON, where integers above 2**53 lose digits


def seed_of(key: str) -> int:
    """The seed of a job with this idempotency key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:_SEED_BYTES], "big")


class JobContext:
    """Implements `contracts.Context` for one attempt of a job; leaving the block closes all writers.

    `folder` gets two folders: "out", what the plugin writes, and "temp", its scratch space.
    """

    def __init__(
        self, inputs: Sequence[InputModel], key: str, folder: Path, lease: Lease,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> None:  # fmt: skip
        self.inputs = inputs
        self.seed = seed_of(key)
        self.out, self.temp = folder / "out", folder / "temp"
        for place in (self.out, self.temp):
            place.mkdir(parents=True)
        self._lease, self._on_progress = lease, on_progress
        self._writers = ExitStack()
        self._written: set[Path] = set()
        self._generator: Generator | None = None
        self._done, self._message, self._lines = 0.0, "", list[str]()
        self._logged, self._last_write = 0, 0.0

    def __enter__(self) -> JobContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writers.__exit__(kind, error, trace)
        finally:
            self.flush()

    def progress(self, done: float, message: str = "") -> None:
        """Report the share done, in [0, 1]; reaches the row about five times a second.

        Raises:
            Cancelled: the user gave up, or the lease was lost.
        """
        self._done = min(1.0, max(0.0, float(done)))
        self._message = " ".join(str(message).split())[:_MESSAGE_LIMIT]
        if self._on_progress:
            self._on_progress(self._done, self._message)
        if time.monotonic() - self._last_write >= _SECONDS_BETWEEN_WRITES:
            self.flush()
        self._lease.check()

    def log(self, message: str) -> None:
        """Add a line to the job's log, with the time. Beyond `LOG_LIMIT` characters it says so and drops the rest."""
        if self._logged >= LOG_LIMIT:
            return
        line = f"{datetime.now(UTC):%H:%M:%S} {message}\n"
        self._logged += len(line)
        self._lines.append(line if self._logged < LOG_LIMIT else _FULL)
        if time.monotonic() - self._last_write >= _SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write progress and waiting log lines to the row; an unreachable database only delays them."""
        self._last_write = time.monotonic()
        try:
            self._lease.beat("".join(self._lines), progress=self._done, message=self._message)
        except StorageError as error:
            LOG.warning("job %s: progress not written: %s", self._lease.job_id, error)
            return
        self._lines.clear()

    def generator(self) -> Generator:
        """A CPU random generator seeded by the job; always the same one, so draws go on where they were."""
        if self._generator is None:
            import torch

            self._generator = torch.Generator().manual_seed(self.seed)
        return self._generator

    def writer(self, path: str, metadata: Mapping[str, str] | None = None) -> TensorWriter:
        """A streaming safetensors writer for `path` in the output folder.

        Raises:
            PluginError: the path leaves the folder or has a writer already.
        """
        from modelgrove_hub.store.writer import SafetensorsWriter

        place = self.path(path)
        if place in self._written:
            raise PluginError(f"output {path!r} has a writer already")
        self._written.add(place)
        return self._writers.enter_context(SafetensorsWriter(place, metadata or {}))

    def path(self, path: str) -> Path:
        """Where to write any other output file; parent folders exist.

        Raises:
            PluginError: the path leaves the output folder.
        """
        return output_place(self.out, path)
