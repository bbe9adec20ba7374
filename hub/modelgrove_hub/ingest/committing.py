"""Commits of clients: a branch's files with some changed become its next revision, through the same gate as ingestion.

What is committed lies in the blob store already. Files that the hub has measured before are not read again. A broken
file is refused with its name; files that do not make a model yet, such as some shards of many, are kept as unknown.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category
from uuid import uuid4

from sqlmodel import Session, col, select

from modelgrove_hub.errors import ConflictError, DataError, NotFoundError, UsageError
from modelgrove_hub.formats.card import read_card
from modelgrove_hub.formats.listing import list_model, read_contents
from modelgrove_hub.formats.outputs import read_outputs
from modelgrove_hub.formats.recognise import Recognition, recognise
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES, Found
from modelgrove_hub.ingest.prepare import Prepared, scan_file
from modelgrove_hub.ingest.register import Stored, register
from modelgrove_hub.registry.commits import Said, find_commit, head
from modelgrove_hub.registry.database import take_turn
from modelgrove_hub.registry.inputs import place_of
from modelgrove_hub.registry.models import check_paths
from modelgrove_hub.store.manifest import FileScan
from modelgrove_hub.tables import Blob, Commit, Model, RevisionFile, Trust

_TRIES = 5
_EMPTY = ".gitattributes"
_STRICT = {".safetensors", ".gguf", ".onnx"}
"""What is called so must be so; a ".bin" may be anything, and is then unknown."""


class StaleError(ConflictError):
    """The branch has moved on since the parent that the caller knows."""

    status = 412


class NothingThereError(NotFoundError):
    """There is nothing at the path that a commit is to take away."""

    code = "EntryNotFound"


@dataclass(frozen=True)
class Change:
    """One thing that a commit does to the files: put a blob at a path, or with `sha256` None take away what is there.

    What is taken away at "a/b/" is everything below that folder.
    """

    path: str
    sha256: str | None


@dataclass(frozen=True)
class Wanted:
    """A commit as it was asked for."""

    model: str
    changes: Sequence[Change]
    said: Said
    parent: str | None = None
    """The commit that the caller believes to be the branch's head; None is any."""


def commit_changes(hub: Hub, wanted: Wanted) -> Commit:
    """Make the commit. Callers that do not name a parent never lose another's changes, and never each other's.

    Raises:
        NotFoundError: there is no such model, branch or blob, or nothing at a path that is taken away.
        StaleError: the branch's head is not the parent.
        DataError: a file breaks its format's rules, or a path cannot be kept; nothing was changed.
        UsageError: the title is empty.
        ConflictError: others commit to this branch faster.
    """
    if not wanted.said.title.strip():
        raise UsageError("a commit needs a title")
    for _ in range(_TRIES):
        with hub.reading() as session:
            model, parent = _start(session, wanted)
            before = _files(session, parent)
            files = _changed(before, wanted)
            blobs = _blobs(session, hub, files)
            scans = _known_scans(session, hub, files)
        if files == before:
            return parent
        with _laid_out(hub, wanted.model, files, blobs) as (folder, places):
            prepared = _prepared(wanted.model, folder, places, files, before, scans)
        stored = _stored(hub, prepared, blobs)
        with hub.transaction() as session:
            take_turn(session)
            now_at = head(session, session.get_one(Model, model.id), wanted.said.branch)
            if now_at is not None and now_at.id == parent.id:
                register(session, stored, wanted.model, said=wanted.said)
                made = head(session, session.get_one(Model, model.id), wanted.said.branch)
                if made is None:
                    raise NotFoundError(f"{wanted.model} has no branch {wanted.said.branch!r}")
                return made
    raise ConflictError(f"others commit to {wanted.said.branch} of {wanted.model} at the same time: try again")


def is_kept(session: Session, hub: Hub, sha256: str) -> bool:
    """Whether a commit may name the blob without its being sent."""
    return session.get(Blob, sha256) is not None or hub.store.exists(sha256)


def _start(session: Session, wanted: Wanted) -> tuple[Model, Commit]:
    model = session.exec(select(Model).where(Model.name == wanted.model)).first()
    if model is None:
        raise NotFoundError(f"no model {wanted.model!r}")
    newest = head(session, model, wanted.said.branch)
    if newest is None:
        raise NotFoundError(f"{wanted.model} has no branch {wanted.said.branch!r}")
    if wanted.parent is not None and find_commit(session, model, wanted.parent).id != newest.id:
        raise StaleError(
            f"{wanted.said.branch} of {wanted.model} is at {newest.id}, not at {wanted.parent}: fetch it first"
        )
    return model, newest


def _files(session: Session, commit: Commit) -> dict[str, str]:
    rows = select(RevisionFile.path, RevisionFile.sha256).where(RevisionFile.revision_id == commit.revision_id)
    return dict(session.exec(rows).all())


def _changed(before: Mapping[str, str], wanted: Wanted) -> dict[str, str]:
    files = dict(before)
    for change in wanted.changes:
        if change.sha256 is not None:
            _check_name(change.path)
            files[change.path] = change.sha256
            continue
        gone = [path for path in files if path == change.path or _is_in(path, change.path)]
        if not gone:
            raise NothingThereError(f"{wanted.model} has nothing at {change.path!r} to delete")
        for path in gone:
            del files[path]
    if not files and _EMPTY in before:
        files = {_EMPTY: before[_EMPTY]}  # a repository is never without a file
    check_paths(files)
    folders = {parent.as_posix() for path in files for parent in Path(path).parents}
    if both := sorted(folders & files.keys()):
        raise DataError(f"{both[0]!a} cannot be a file and a folder")
    return files


def _check_name(path: str) -> None:
    # Who fetches the model writes such a file into a folder of theirs.
    if any(category(letter) == "Cc" for letter in path) or ".git" in path.lower().split("/"):
        raise DataError(f"file {path[:80]!a}: no name with control characters, and nothing in .git, is taken")


def _is_in(path: str, folder: str) -> bool:
    return folder.endswith("/") and path.startswith(folder)


def _blobs(session: Session, hub: Hub, files: Mapping[str, str]) -> dict[str, Blob]:
    """Rows of the files' bytes by sha256: known ones, and new ones of what was just uploaded."""
    wanted = set(files.values())
    found = {blob.sha256: blob for blob in session.exec(select(Blob).where(col(Blob.sha256).in_(wanted)))}
    for sha256 in wanted - found.keys():
        stored = hub.store.find(sha256)
        if stored is None:
            path = next(path for path, held in files.items() if held == sha256)
            raise NotFoundError(f"{path!a}: its content {sha256} was not uploaded")
        found[sha256] = Blob(sha256=sha256, size=stored.size)
    return found


def _known_scans(session: Session, hub: Hub, files: Mapping[str, str]) -> dict[str, FileScan]:
    query = select(RevisionFile.sha256, RevisionFile.manifest).where(
        col(RevisionFile.sha256).in_(set(files.values())), col(RevisionFile.manifest).is_not(None)
    )
    kept = {sha256: manifest for sha256, manifest in session.exec(query) if manifest and hub.store.exists(manifest)}
    return {sha256: FileScan.from_json(hub.store.path(one).read_bytes()) for sha256, one in kept.items()}


@contextmanager
def _laid_out(
    hub: Hub, name: str, files: Mapping[str, str], blobs: Mapping[str, Blob]
) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A folder of links to the files, as recognition reads a model, and where each file is."""
    folder = hub.settings.incoming / f"commit-{uuid4().hex}"
    places = {path: place_of(hub, name, path, blobs[sha256]) for path, sha256 in files.items()}
    try:
        for path, place in places.items():
            link = folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place.absolute())
        yield folder, places
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepared(
    name: str, folder: Path, places: dict[str, Path], files: Mapping[str, str], before: Mapping[str, str],
    scans: Mapping[str, FileScan],
) -> Prepared:  # fmt: skip
    new = [path for path, sha256 in files.items() if before.get(path) != sha256]
    recognition = _recognised(folder, places, new)
    scanned = {path: scans.get(sha256) or scan_file(Path(path), places[path]) for path, sha256 in files.items()}
    for path, own in scanned.items():
        if own.sha256 != files[path]:
            raise DataError(f"{path!a} is not what was uploaded: its bytes have the hash {own.sha256}")
    outputs = read_outputs(places, recognition.kind, recognition.family, recognition.parts)
    found = Found(folder, places, name, folder)
    mtimes = {path: place.stat().st_mtime_ns for path, place in places.items()}
    return Prepared(found, scanned, mtimes, recognition, read_card(places), outputs)


def _recognised(folder: Path, places: Mapping[str, Path], new: Sequence[str]) -> Recognition:
    weights = [path for path in places if Path(path).suffix in WEIGHT_SUFFIXES]
    if not weights:
        return Recognition(reasons=("it has no weights yet",))
    root = folder / weights[0] if len(weights) == 1 and "/" not in weights[0] and len(places) == 1 else folder
    try:
        return recognise(list_model(root, within=Path("/")))
    except DataError as error:
        said = str(error).replace(f"{folder}/", "").replace(str(folder), "the repository")
    unsafe = False
    for path in weights:
        try:
            unsafe |= read_contents(folder / path).pickle is not None
        except DataError as error:
            if path in new and Path(path).suffix in _STRICT:
                raise DataError(str(error).replace(f"{folder}/", "")) from error
    return Recognition(trust=Trust.QUARANTINED if unsafe else Trust.OK, reasons=(f"not one model: {said}",))


def _stored(hub: Hub, prepared: Prepared, blobs: Mapping[str, Blob]) -> Stored:
    """The rows that will name what lies in the store; manifests are put there now."""
    manifests, rows = {}, [Blob.model_validate(blob.model_dump()) for blob in blobs.values()]
    for path, found in prepared.scans.items():
        if found.tensors:
            kept = hub.store.put_bytes(found.to_json().encode())
            manifests[path] = kept.sha256
            rows.append(Blob(sha256=kept.sha256, size=kept.size))
    files = {path: found.sha256 for path, found in prepared.scans.items()}
    return Stored(prepared, tuple(rows), files, manifests, hub.store)
