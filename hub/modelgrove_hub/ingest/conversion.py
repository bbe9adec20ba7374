"""Pickles by explicit opt-in: the tensors of a quarantined model, as a second model of safetensors files.

The pickle stays what it is, quarantined. It is copied to where nobody else writes, hashed on the way, and what has the
registered hash is read by `ingest.unpickling` in a process of its own. What that process wrote is a stranger's file
again, and goes through the same checks as every other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, cast

from sqlmodel import Session, col, select

from modelgrove_hub.errors import DataError, UnsafeFileError
from modelgrove_hub.formats.listing import Listing, Role, list_model
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.confined import can_confine
from modelgrove_hub.ingest.discover import Found
from modelgrove_hub.ingest.prepare import prepare
from modelgrove_hub.ingest.register import register, store
from modelgrove_hub.ingest.unpickling import BYTES_A_SECOND, SECONDS
from modelgrove_hub.jobs.statement import conversion_statement
from modelgrove_hub.registry.attestations import attest
from modelgrove_hub.registry.blobs import name_blobs
from modelgrove_hub.registry.events import record
from modelgrove_hub.registry.lineage import add_edge
from modelgrove_hub.registry.models import latest_revision
from modelgrove_hub.registry.names import clean_name, free_name
from modelgrove_hub.store.disk import make_folder, open_regular, storage_errors
from modelgrove_hub.tables import AttestationKind, Blob, Edge, Model, Relation, Revision, RevisionFile

_SUFFIX = ".safetensors"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_MAX_REPORT = 16 * 2**20
_CHUNK = 2**20
_EVIDENCE = "pickles"
_UNCLEAN = "not converted: "


def convert(hub: Hub, found: Found, model: Model) -> Model | None:
    """Convert the pickles of `model`, which was found at `found`, and register what comes of it.

    Returns:
        The new model; None if it has no pickles, or they were converted before.

    Raises:
        UnsafeFileError: one is not clean, or this machine cannot confine the process that would read it.
        DataError: a file has changed since it was registered, or holds what safetensors cannot.
        StorageError: the disk refuses.
    """
    listing = list_model(found.root, within=found.top)
    with hub.reading() as session:
        revision = latest_revision(session, session.merge(model, load=False))
        hashes = _hashes(session, revision)
        before = _converted(session, revision)
    if not listing.pickles or before:
        return None
    _check(listing, found)
    make_folder(hub.settings.home / "tmp")
    with TemporaryDirectory(prefix="converting.", dir=hub.settings.home / "tmp") as place, storage_errors(place):
        files, reports = _lay_out(found, listing, hashes, Path(place))
        root = next(iter(files.values())) if len(files) == 1 and not found.root.is_dir() else Path(place) / "out"
        stored = store(hub, prepare(Found(root, files, found.name, Path(place) / "out")), "hardlink")
        document = hub.store.put_bytes(conversion_statement(model.name, hashes, reports, stored.files))
    with hub.transaction() as session:
        name = free_name(session, clean_name(f"{model.name}-safetensors"), stored.files)
        made, new, _ = register(session, stored, name)
        parent = cast(Revision, session.get(Revision, revision.id))
        evidence = {_EVIDENCE: {path: hashes[path] for path in sorted(listing.pickles)}}
        add_edge(session, new, parent, Relation.COPY, evidence=evidence)
        name_blobs(session, [Blob(sha256=document.sha256, size=document.size)])
        attest(session, made, new, AttestationKind.PROVENANCE, document.sha256)
        return made


def keep_reason(hub: Hub, model: Model, reason: str) -> None:
    """Say with the model, and in the event log, why its pickles were not converted."""
    with hub.transaction() as session:
        model = session.merge(model, load=False)
        revision = latest_revision(session, model)
        others = [text for text in revision.summary.get("reasons", []) if not text.startswith(_UNCLEAN)]
        revision.summary = {**revision.summary, "reasons": [*others, _UNCLEAN + reason]}
        session.add(revision)
        record(session, "unconverted", model.name, revision=revision.digest, reason=reason)


def _check(listing: Listing, found: Found) -> None:
    code = sorted(path for path, role in listing.files.items() if role is Role.CODE)
    if code:
        raise UnsafeFileError(f"{found.root}: {code[0]} is Python code, so its pickles are not converted")
    if shards := sorted(path for path in listing.pickles if _SHARD.search(path)):
        raise DataError(f"{found.root}: {shards[0]} is one of several shards, which are not converted: join them first")
    if not can_confine():
        raise UnsafeFileError("pickles are converted on Linux (x86-64, arm64) alone, where a process can be confined")


def _hashes(session: Session, revision: Revision) -> dict[str, str]:
    query = select(RevisionFile.path, RevisionFile.sha256).where(RevisionFile.revision_id == revision.id)
    return dict(session.exec(query).all())


def _converted(session: Session, revision: Revision) -> bool:
    edges = session.exec(select(Edge).where(Edge.parent_id == revision.id, col(Edge.relation) == Relation.COPY))
    return any(_EVIDENCE in (edge.evidence or {}) for edge in edges)


def _lay_out(
    found: Found, listing: Listing, hashes: dict[str, str], place: Path
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files of the new model in `place`/out, and what is told of each pickle."""
    files: dict[str, Path] = {}
    reports: dict[str, Any] = {}
    for path, source in sorted(found.files.items()):
        if listing.files.get(path) in (Role.PICKLE, Role.INDEX) and path not in listing.pickles:
            continue
        name = _new_name(path) if path in listing.pickles else path
        if name in files or (name != path and name in found.files):
            raise DataError(f"{source}: there is a {name} beside it already")
        files[name] = place / "out" / name
        files[name].parent.mkdir(parents=True, exist_ok=True)
        copy = place / "pickle" if path in listing.pickles else files[name]
        if _copy(source, copy) != hashes[path]:
            raise DataError(f"{source} has changed since it was registered: ingest it again")
        if path in listing.pickles:
            reports[path] = _unpickle(copy, files[name], source)
            copy.unlink()
    return files, reports


def _new_name(path: str) -> str:
    """What loaders look for: transformers calls a pickle pytorch_model.bin and safetensors model.safetensors."""
    old = PurePosixPath(path)
    stem = "model" if old.name == "pytorch_model.bin" else old.stem
    return old.with_name(stem + _SUFFIX).as_posix()


def _copy(source: Path, target: Path) -> str:
    """Copy a file; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with open_regular(source) as file, target.open("xb") as out:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def _unpickle(pickle: Path, target: Path, source: Path) -> dict[str, Any]:
    """Let the confined process convert `pickle` (a copy of `source`) to `target`; its report.

    Raises:
        UnsafeFileError: it was refused, or the process did not come to its end.
    """
    limit = 2 * (SECONDS + pickle.stat().st_size // BYTES_A_SECOND)
    said = pickle.with_name("said")
    with ExitStack() as stack:
        opened = [
            stack.enter_context(path.open(mode)) for path, mode in ((pickle, "rb"), (target, "xb"), (said, "w+b"))
        ]
        numbers = [file.fileno() for file in opened]
        command = [sys.executable, "-I", "-m", "modelgrove_hub.ingest.unpickling", *map(str, numbers)]
        try:
            done = subprocess.run(
                command, pass_fds=numbers, env=_environment(), cwd=pickle.parent, timeout=limit, check=False,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UnsafeFileError(f"{source}: the process that read it was stopped after {limit} seconds") from None
        opened[2].seek(0)
        text = opened[2].read(_MAX_REPORT)
    said.unlink()
    if done.returncode:
        raise UnsafeFileError(f"{source}: the process that read it {_end(done.returncode)}")
    report: dict[str, Any] = json.loads(text)
    if "refused" in report:
        raise UnsafeFileError(f"{source}: {report['refused']}")
    return report


def _end(code: int) -> str:
    if code > 0:
        return f"could not start or go on (exit code {code})"
    what = "took too long" if -code in (signal.SIGXCPU, signal.SIGKILL) else "was stopped"
    return f"{what} ({signal.Signals(-code).name})"


def _environment() -> dict[str, str]:
    """Nothing of the user's but what the interpreter's libraries are found by."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1"}
