"""A registered model as a plugin sees it: facts from the rows, tensors and files from disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sqlmodel import Session, col, select

from modelgrove_hub.errors import DataError, ModelgroveError, NotFoundError, StorageError, UnsafeFileError
from modelgrove_hub.formats.folders import chosen_weights
from modelgrove_hub.registry.models import latest_revision
from modelgrove_hub.registry.trees import find_root
from modelgrove_hub.store.header import read_header
from modelgrove_hub.store.tensors import StoredTensor, tensors_of
from modelgrove_hub.tables import Blob, Model, Revision, RevisionFile, Trust

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.hub import Hub
    from modelgrove_hub.store.manifest import FileScan

_WEIGHTS = ".safetensors"


@dataclass(slots=True)
class ModelTensor:
    """A tensor of a model (a `contracts.LazyTensor`); components have tensors of the same key, so the name has both."""

    name: str
    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    stored: StoredTensor

    def read(self) -> Tensor:
        """The values; see `StoredTensor.read`."""
        return self.stored.read()


@dataclass(frozen=True)
class RegisteredModel:
    """A revision whose files are on this machine (a `contracts.InputModel`)."""

    name: str
    family: str
    adapter_type: str | None
    revision_id: int
    summary: Mapping[str, Any]
    card: str
    tags: Sequence[str]
    paths: Mapping[str, Path]
    base: RegisteredModel | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of those files whose hashes are known."""
    manifests: Mapping[str, Path] = field(default_factory=dict)
    """What ingest measured of those weight files that it scanned: path in the model → manifest on this machine."""

    def tensors(self) -> Iterator[ModelTensor]:
        """All tensors of all weight files but spare copies, files by path, tensors in file order.

        Raises:
            DataError: no file is safetensors, or one breaks the format's rules.
        """
        for file in self._weights():
            folder = PurePosixPath(file).parent.as_posix()
            before = "" if folder == "." else f"{folder}/"
            for stored in tensors_of(self.paths[file]):
                yield ModelTensor(before + stored.name, stored.name, file, stored.dtype, stored.shape, stored)

    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of all weight files; where two disagree, the first by path is right."""
        merged: dict[str, str] = {}
        for file in reversed(self._weights()):
            merged.update(read_header(self.paths[file]).metadata)
        return merged

    def files(self) -> dict[str, Path]:
        """The revision's files: path in the model → path on this machine."""
        return dict(self.paths)

    def sha256(self, path: str) -> str:
        """The hash of the file at `path` in the model; computed where it is not known.

        Raises:
            NotFoundError, DataError, StorageError: the file cannot be opened or read.
        """
        from modelgrove_hub.store.manifest import scan_bytes

        return self.hashes.get(path) or scan_bytes(self.paths[path]).sha256

    def scans(self) -> dict[str, FileScan]:
        """What ingest measured, by path in the model; nothing of the weights is read.

        Raises:
            CorruptFileError: a manifest is damaged, or of another version.
        """
        from modelgrove_hub.store.manifest import FileScan

        return {path: FileScan.from_json(manifest.read_bytes()) for path, manifest in self.manifests.items()}

    def _weights(self) -> list[str]:
        found = [path for path in chosen_weights(self.paths) if path.endswith(_WEIGHTS)]
        if not found:
            held = ", ".join(sorted(self.paths)[:5])
            raise DataError(f"model {self.name} holds no safetensors file to read tensors from, only {held}")
        return found


def load_input(hub: Hub, revision_id: int) -> RegisteredModel:
    """The registered model of a revision, its files looked up and found as they were.

    Raises:
        NotFoundError: there is no such revision (any more).
        UnsafeFileError: it is quarantined.
        StorageError: a file is gone.
        DataError: a referenced file has changed since it was registered.
    """
    with hub.reading() as session:
        revision = session.get(Revision, revision_id)
        model = session.get(Model, revision.model_id) if revision else None
        if revision is None or model is None:
            raise NotFoundError(f"no revision with id {revision_id}: its model was removed")
        blobs = _blobs(session, revision_id)
        manifests = {row.path: hub.store.path(row.manifest) for row, _ in blobs if row.manifest}
        root = _root(session, model)
    if Trust.QUARANTINED in (model.trust, revision.summary.get("trust")):
        reasons = "; ".join(map(str, revision.summary.get("reasons", ()))) or "its files may run code"
        raise UnsafeFileError(f"model {model.name} is quarantined, so its files are not read: {reasons}")
    return RegisteredModel(
        name=model.name, family=model.family, adapter_type=model.adapter_type, revision_id=revision_id,
        summary=revision.summary, card=model.card, tags=tuple(model.tags),
        paths={row.path: place_of(hub, model.name, row.path, blob) for row, blob in blobs},
        base=_base(hub, root) if root is not None else None,
        hashes={row.path: blob.sha256 for row, blob in blobs},
        manifests={path: file for path, file in manifests.items() if file.exists()},
    )  # fmt: skip


def _root(session: Session, model: Model) -> int | None:
    """The revision of the network that the model grew from; None for that network itself, or if none is sure."""
    if model.tree is None or (model.tree_reason or {}).get("by") == "family":
        return None
    root = find_root(session, model.tree)
    return None if root is None or root.id == model.id else latest_revision(session, root).id


def _base(hub: Hub, revision_id: int) -> RegisteredModel | None:
    try:
        return load_input(hub, revision_id)
    except ModelgroveError:  # `fsck` tells; most methods need no base
        return None


def _blobs(session: Session, revision_id: int) -> list[tuple[RevisionFile, Blob]]:
    query = select(RevisionFile, Blob).join(Blob, col(Blob.sha256) == col(RevisionFile.sha256))
    rows = session.exec(query.where(RevisionFile.revision_id == revision_id).order_by(col(RevisionFile.path)))
    return [(row, blob) for row, blob in rows]


def place_of(hub: Hub, name: str, path: str, blob: Blob) -> Path:
    """Where the bytes of `path` in the model called `name` lie on this machine.

    Raises:
        StorageError: they are gone.
        DataError: a referenced file has changed since it was registered.
    """
    if blob.path is None:
        return hub.store.path(blob.sha256)
    place = Path(blob.path)
    try:
        found = place.stat()
    except OSError as error:
        raise StorageError(
            f"{place}: {error.strerror}; {path} of {name} was referenced there: put it back, or see `modelgrove fsck`"
        ) from error
    if (found.st_size, found.st_mtime_ns) != (blob.size, blob.mtime_ns):
        raise DataError(
            f"{place} has changed since {name} was registered: "
            "ingest it again for a new revision, or see `modelgrove fsck`"
        )
    return place
