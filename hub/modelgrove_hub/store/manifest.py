"""What a weight file holds: one pass over its bytes gives hashes, norms and a sketch of every tensor.

Three hashes identify weights whatever the file around them looks like: `weights_hash` ignores
the metadata and the order, `values_hash` also the names (a renamed copy), `inventory_hash`
looks at names and shapes alone (the same architecture).
"""

from __future__ import annotations

import binascii
import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.header import TensorInfo, parse_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
"""Of the JSON text and of the sketch's positions."""
PIECE = 2**17
"""Bytes read at a time: small enough for the cache between two hashes and a norm."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a scanned file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, counted from the beginning of the file."""
    sha256: str
    """Of the tensor's bytes."""
    norm: float | None
    """L2 norm to nine digits (relative error 1e-6); None if not of a float type, or not finite."""
    samples: bytes
    """The stored bytes of the values at `sketch.positions`; empty if not of a float type."""

    @property
    def sketch(self) -> NDArray[np.float32]:
        """The values at `sketch.positions(numel)`: (≤ 64,) float32, empty if not of a float type."""
        import numpy as np

        from modelgrove_hub.store.floats import decode

        with np.errstate(over="ignore"):
            return decode(self.dtype, np.frombuffer(self.samples, np.uint8)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class FileScan:
    """A scanned file. No tensors if it is not a safetensors file."""

    sha256: str
    size: int
    tensors: tuple[TensorRow, ...] = ()
    metadata: dict[str, str]

    def to_json(self) -> str:
        """As compact JSON, a list a tensor."""
