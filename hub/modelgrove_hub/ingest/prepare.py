"""Read one model once: hashes, sketches and recognition, without the database.

This is the costly half of ingestion; it may run in another process.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelgrove_hub.errors import DataError, ModelgroveError
from modelgrove_hub.formats.card import Card, read_card
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.outputs import Outputs, read_outputs
from modelgrove_hub.formats.recognise import Recognition, recognise
from modelgrove_hub.ingest.discover import Found
from modelgrove_hub.ingest.sidecars import add_sidecars
from modelgrove_hub.registry.attestations import MAX_SIGNATURE_BYTES
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.manifest import FileScan, TensorRow, scan, scan_bytes


@dataclass(frozen=True)
class Prepared:
    """All that registration needs to know about a model on disk."""

    found: Found
    scans: dict[str, FileScan]
    mtimes: dict[str, int]
    recognition: Recognition
    card: Card
    outputs: Outputs | None
    """What the weights of a model of a known family move."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Facts of the card that came from a side-car file, and which."""

    @property
    def tensors(self) -> tuple[TensorRow, ...]:
        """All tensors of all weight files, in the order of the paths."""
        return tuple(row for path in sorted(self.scans) for row in self.scans[path].tensors)

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Names of the tensors that hold NaN or infinite values."""
        return tuple(row.name for row in self.tensors if row.norm is None and DTYPES[row.dtype].is_float)


def prepare(found: Found) -> Prepared:
    """Hash and recognise a model.

    Raises:
        DataError: a file breaks its format's rules, or the folder is no model; the message
            names the file.
    """
    if found.refused:
        raise DataError(found.refused)
    if found.signature is not None and found.signature.stat().st_size > MAX_SIGNATURE_BYTES:
        raise DataError(f"{found.signature} is larger than {MAX_SIGNATURE_BYTES >> 20} MiB: no signature")
    mtimes = {path: file.stat().st_mtime_ns for path, file in found.files.items()}
    recognition = recognise(list_model(found.root, within=found.top))
    scans = {path: scan_file(file, file) for path, file in found.files.items()}
    for path, file in found.files.items():
        if file.stat().st_mtime_ns != mtimes[path]:
            raise DataError(f"{file} changed while it was read: ingest it again when it is complete")
    outputs = read_outputs(found.files, recognition.kind, recognition.family, recognition.parts)
    card, origin = add_sidecars(read_card(found.files), found.files)
    return Prepared(found, scans, mtimes, recognition, card, outputs, origin)


def attempt(found: Found) -> Prepared | str:
    """The same, with the reason in place of any exception: one file must not end the ingestion of thousands."""
    try:
        return prepare(found)
    except ModelgroveError as error:
        return str(error)
    except OSError as error:
        return f"{found.root}: {error.strerror or error}"
    except Exception as error:  # noqa: BLE001  (whatever it is, the others go on)
        if "MODELGROVE_DEBUG" in os.environ:  # set by --debug; this may be another process
            traceback.print_exc()
        return f"{found.root}: not understood, which is a bug of modelgrove: {type(error).__name__}: {error}"


def scan_file(name: Path, file: Path) -> FileScan:
    """Hash a file that is called `name`, and measure the tensors of one that is called safetensors.

    Raises:
        CorruptFileError: it is called so and is none.
        NotFoundError, DataError, StorageError: it cannot be opened or read.
    """
    return scan(file) if name.suffix == ".safetensors" else scan_bytes(file)
