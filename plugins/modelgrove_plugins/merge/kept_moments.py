"""Second moments of layers' inputs in files: measured by one merge, used by the next ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Context, InputModel
from modelgrove_hub.errors import CorruptFileError, DataError, UsageError
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.store.header import read_header
from modelgrove_hub.store.tensors import StoredTensor, all_finite, tensors_of
from modelgrove_plugins.merge.wording import prompts_of

if TYPE_CHECKING:
    from torch import Tensor

FILE = "inputs.safetensors"
"""Artefact: "DIGEST.MODULE", (n, n) float32, for each adapter, with its words, and module that were watched."""
_KEY = "modelgrove.inputs"


class KeptMoments:
    """What earlier files hold of these adapters, and a file for what is measured now.

    A file belongs to one base and one way of measuring: `facts` (pictures, steps) are compared with its own.

    Raises:
        UsageError: a file is of another base, or measured in another way.
        CorruptFileError: a file holds no moments.
        NotFoundError, DataError, StorageError: a file cannot be opened or read.
    """

    def __init__(
        self, context: Context, files: Sequence[Path], base: InputModel, adapters: Sequence[InputModel],
        facts: Mapping[str, int], *, keep: bool,
    ) -> None:  # fmt: skip
        self._digests = [_watched_digest(model) for model in adapters]
        mine: dict[str, Any] = {"base": _digest(base), **facts}
        self._known: dict[str, StoredTensor] = {}
        for path in files:
            _check(path, mine)
            self._known |= {tensor.name: tensor for tensor in tensors_of(path)}
        self._writer = context.writer(FILE, {_KEY: json.dumps(mine)}) if keep else None
        self._written: set[str] = set()

    def holds(self, site: str, place: int) -> bool:
        """Whether the adapter at `place` was watched there before."""
        return self._name(site, place) in self._known

    def read(self, site: str, place: int, columns: int) -> Tensor:
        """(columns, columns) float32, as it was measured; written along to the new file.

        Raises:
            DataError: it has another shape or type, or is not finite.
        """
        stored = self._known[self._name(site, place)]
        if stored.shape != (columns, columns) or stored.dtype != "F32":
            raise DataError(
                f"{stored.path}: tensor {stored.name} is {stored.dtype} of shape {stored.shape}, "
                f"not F32 of ({columns}, {columns})"
            )
        moment = stored.read()
        if not all_finite(moment):
            raise DataError(f"{stored.path}: tensor {stored.name} holds NaN or infinite values")
        self.write(site, place, moment)
        return moment

    def write(self, site: str, place: int, moment: Tensor) -> None:
        """Keep it, if that is wanted; the same adapter given twice is kept once."""
        name = self._name(site, place)
        if self._writer is not None and name not in self._written:
            self._writer.add(name, moment)
            self._written.add(name)

    def _name(self, site: str, place: int) -> str:
        return f"{self._digests[place]}.{site}"


def _digest(model: InputModel) -> str:
    return digest_of({path: model.sha256(path) for path in model.files()})


def _watched_digest(model: InputModel) -> str:
    """Of an adapter and the words that it is watched with: without others they are its name, which is in no file."""
    words = json.dumps(prompts_of(model)).encode()
    return hashlib.sha256(_digest(model).encode() + words).hexdigest()


def _check(path: Path, mine: Mapping[str, Any]) -> None:
    text = read_header(path).metadata.get(_KEY)
    try:
        found = json.loads(text) if text else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path}: holds no moments of inputs, which `merge --keep-inputs` writes")
    for name, value in mine.items():
        if found.get(name) != value:
            raise UsageError(
                f"{path} was measured with {name} {str(found.get(name))[:80]}, this merge has {value}: measure anew"
            )
