"""A safetensors output whose metadata is known only at the end, such as errors and ranks of its tensors.

The contract's writer wants the metadata first, so tensors wait in a scratch file meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

from modelgrove_hub.contracts import Context
from modelgrove_hub.store.tensors import tensors_of
from modelgrove_hub.store.writer import SafetensorsWriter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Spool:
    """Takes tensors now and metadata until the block ends (a `contracts.TensorWriter`)."""

    _writer: SafetensorsWriter
    metadata: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        self._writer.add(name, tensor)


@contextmanager
def spooled(context: Context, path: str) -> Iterator[Spool]:
    """A spool that becomes the output file `path` at the end of the block; nothing if it fails."""
    scratch = context.temp / f"{uuid4().hex}.safetensors"
    with SafetensorsWriter(scratch) as writer:
        spool = Spool(writer)
        yield spool
    output = context.writer(path, spool.metadata)
    for tensor in tensors_of(scratch):
        output.add(tensor.name, tensor.read())
    scratch.unlink()
