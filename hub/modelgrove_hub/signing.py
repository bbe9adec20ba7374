"""Signatures over all files of a model: OpenSSF Model Signing (OMS) v1, a Sigstore bundle made with an EC key.

`model-signing` hashes, signs and checks. Our policy stands before it: every file must be signed, no link is followed,
and a signature that leaves out more than `LEFT_OUT` is refused, for its signer's list would decide what is looked at.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.attestations import MAX_SIGNATURE_BYTES, SIGNATURE_FILE, attest, attestations_of
from modelgrove_hub.registry.blobs import name_blobs
from modelgrove_hub.registry.inputs import RegisteredModel, load_input
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.tables import AttestationKind, Blob, Model, Revision

LEFT_OUT = frozenset({SIGNATURE_FILE, ".git", ".gitattributes", ".github", ".gitignore"})
"""Paths that a signature may leave out: itself, and what `model_signing` leaves out unless told. None may be there."""
_PREDICATE = "https://model_signing/signature/v1.0"
_LEAST_SHARD = 1 << 20
_KEYS = "a PEM file with an EC key on P-256, P-384 or P-521, not encrypted"
_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Checked:
    """A signature that was checked; `reason` says why it does not hold, and is empty where it holds."""

    name: str
    """Its sha256 in the hub, or the name of its file."""
    reason: str


def sign(folder: Path, key: Path) -> bytes:
    """A signature over every file below `folder`, as the bytes of a bundle.

    Raises:
        UsageError: model-signing is not installed, or `key` is no private key that it knows.
        DataError: there is a link, or something that is no file.
    """
    _refuse_links(folder)
    signing, hashing = _library("signing"), _library("hashing")
    config = signing.Config()
    with _key_errors(key, "private"):
        config.use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False))
    with TemporaryDirectory() as elsewhere:
        place = Path(elsewhere) / SIGNATURE_FILE
        config.sign(folder, place)
        return place.read_bytes()


def check(folder: Path, signature: bytes, key: Path) -> None:
    """See that `signature` was made with the private half of `key`, over exactly the files below `folder`.

    Raises:
        UsageError: model-signing is not installed, or `key` is no public key that it knows.
        DataError: it was not, or the policy refuses it; the message names the files.
    """
    hashing, verifying = _library("hashing"), _library("verifying")
    how = _admitted(signature, folder)
    _refuse_links(folder)
    config = verifying.Config().set_ignore_unsigned_files(False)
    with _key_errors(key, "public"):
        config.use_elliptic_key_verifier(public_key=key)
    config.set_hashing_config(_hashing(hashing, how).set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False))
    with TemporaryDirectory() as elsewhere:
        place = Path(elsewhere) / SIGNATURE_FILE
        place.write_bytes(signature)
        try:
            with redirect_stdout(sys.stderr):  # the library prints warnings
                config.verify(folder, place)
        except import_module("cryptography.exceptions").InvalidSignature:
            raise DataError(f"the signature was not made with the key of {key}, or was changed since") from None
        except _MALFORMED as error:
            raise DataError(f"the signature does not hold: {error}") from None


def sign_revision(hub: Hub, revision_id: int, key: Path) -> str:
    """Sign the files of a revision and keep the signature with it; returns the signature's sha256.

    Raises:
        UsageError: as `sign`.
        DataError: as `sign`, or the bytes are no longer those that were registered.
        NotFoundError, UnsafeFileError, StorageError: as `load_input`.
    """
    source = load_input(hub, revision_id)
    with _laid_out(hub, source) as folder:
        signature = sign(folder, key)
    hashed = {entry["name"]: entry["digest"] for entry in _statement(signature)["predicate"]["resources"]}
    if changed := sorted(path for path, sha256 in source.hashes.items() if hashed.get(path) != sha256):
        raise DataError(f"{_some(changed)}: not the bytes that were registered: see `modelgrove fsck --full`")
    stored = hub.store.put_bytes(signature)
    with hub.transaction() as session:
        name_blobs(session, [Blob(sha256=stored.sha256, size=stored.size)])
        revision = session.get(Revision, revision_id)
        model = session.get(Model, revision.model_id) if revision else None
        if revision is None or model is None:
            raise NotFoundError(f"no revision with id {revision_id}: its model was removed meanwhile")
        attest(session, model, revision, AttestationKind.SIGNATURE, stored.sha256)
    return stored.sha256


def check_revision(hub: Hub, revision_id: int, key: Path, signature: Path | None = None) -> list[Checked]:
    """Check each signature that is kept with a revision, newest first, or the one in a file.

    Raises:
        NotFoundError: there is none.
        UsageError: as `check`.
    """
    found = {signature.name: read_signature(signature)} if signature else _kept(hub, revision_id)
    with _laid_out(hub, load_input(hub, revision_id)) as folder:
        return [Checked(name, _reason(folder, document, key)) for name, document in found.items()]


def read_signature(path: Path) -> bytes:
    """The bytes of a signature's file.

    Raises:
        NotFoundError, StorageError: it cannot be opened.
        DataError: it is no regular file, or larger than any signature.
    """
    if path.is_symlink():
        raise DataError(f"{path} is a link: no link is followed")
    with open_regular(path) as file, storage_errors(path):
        document = file.read(MAX_SIGNATURE_BYTES + 1)
    if len(document) > MAX_SIGNATURE_BYTES:
        raise DataError(f"{path} is larger than {MAX_SIGNATURE_BYTES >> 20} MiB: no signature")
    return document


def _kept(hub: Hub, revision_id: int) -> dict[str, bytes]:
    with hub.reading() as session:
        names = attestations_of(session, revision_id, AttestationKind.SIGNATURE)
    if not names:
        raise NotFoundError("no signature is kept with it: `modelgrove sign` makes one, --signature names a file")
    found = {}
    for name in names:
        with hub.store.open(name) as file:
            found[name] = file.read()
    return found


def _reason(folder: Path, document: bytes, key: Path) -> str:
    try:
        check(folder, document, key)
    except DataError as error:
        return str(error)
    return ""


@contextmanager
def _laid_out(hub: Hub, model: RegisteredModel) -> Iterator[Path]:
    """The model's files as a folder, linked and not copied where the file system can."""
    top = hub.settings.home.absolute() / "tmp"
    with storage_errors(top):
        top.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="signing", dir=top) as folder:
            root = Path(folder) / model.name.rpartition("/")[2]
            for path, source in model.files().items():
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source.resolve(), target)
                except OSError:  # another file system, or a file of another user
                    shutil.copyfile(source, target)
            yield root


def _admitted(signature: bytes, folder: Path) -> Mapping[str, Any]:
    """How the signer says that it hashed, if the policy takes it."""
    try:
        statement = _statement(signature)
        predicate = statement["predicateType"]
        how: dict[str, Any] = statement["predicate"].get("serialization", {})
        left_out, links = [str(path) for path in how.get("ignore_paths", ())], how.get("allow_symlinks", False)
    except _MALFORMED as error:
        raise DataError(f"this is no signature in a Sigstore bundle: {error!r}") from None
    if predicate != _PREDICATE:
        raise DataError(f"the signature is of type {predicate!a}, not {_PREDICATE}: sign the model again")
    if more := sorted(set(left_out) - LEFT_OUT):
        raise DataError(f"the signature leaves out {_some(more)}: only {_some(sorted(LEFT_OUT))} may be left out")
    if links is not False:
        raise DataError("the signature allows links: sign the model again without them")
    if there := [path for path in left_out if path != SIGNATURE_FILE and os.path.lexists(folder / path)]:
        raise DataError(f"{_some(there)}: not covered by the signature, which leaves it out: remove it")
    return how


def _statement(signature: bytes) -> dict[str, Any]:
    statement: dict[str, Any] = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    return statement


def _hashing(hashing: Any, how: Mapping[str, Any]) -> Any:
    """The hashing that the signer says it used; never one that follows links."""
    config = hashing.Config()
    try:
        if how["method"] == "files":
            return config.use_file_serialization(hashing_algorithm=how["hash_type"])
        if how["method"] == "shards" and how["shard_size"] >= _LEAST_SHARD:
            size = int(how["shard_size"])  # protobuf made a float of it
            return config.use_shard_serialization(hashing_algorithm=how["hash_type"], shard_size=size)
    except _MALFORMED as error:
        raise DataError(f"the signature hashes in a way that is not known: {error}") from None
    raise DataError(f"the signature hashes in a way that is not known: {dict(how)!a}")


def _refuse_links(folder: Path) -> None:
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such folder")
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_symlink():
            raise DataError(f"{path} is a link to {path.readlink()}: no link is followed")
        if not (path.is_file() or path.is_dir()):
            raise DataError(f"{path} is neither a file nor a folder")
    if (folder / SIGNATURE_FILE).is_dir():
        raise DataError(f"{folder / SIGNATURE_FILE} is a folder: what is in it would not be looked at")


@contextmanager
def _key_errors(key: Path, half: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotFoundError(f"{key}: {error.strerror}") from None
    except (*_MALFORMED, import_module("cryptography.exceptions").UnsupportedAlgorithm) as error:
        raise UsageError(f"{key} holds no {half} key that can be used here ({error}): give {_KEYS}") from None


def _library(module: str) -> Any:
    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise UsageError(f"signatures need more packages ({error}): pip install 'modelgrove[sign]'") from None


def _some(paths: Sequence[str]) -> str:
    return ", ".join(ascii(path) for path in paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
