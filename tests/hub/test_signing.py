"""A signature holds for exactly the files that were signed, whatever else a signer or a stranger would like."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import hashing, signing

from modelgrove_hub.cli.export import export
from modelgrove_hub.cli.sign import check_signature
from modelgrove_hub.cli.sign import sign as sign_command
from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.registry.models import files_of, find_revision
from modelgrove_hub.signing import check, check_revision, sign, sign_revision
from modelgrove_hub.store.fsck import check as fsck
from modelgrove_hub.store.gc import find_garbage

DEFAULTS = [".git", ".gitattributes", ".github", ".gitignore", "model.sig"]


def _write_key(folder: Path, name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, pkcs8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public half."""
    return _write_key(tmp_path_factory.mktemp("keys"), "ann", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder."""
    made = tmp_path / "flower"
    (made / "unet").mkdir(parents=True)
    (made / "unet" / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (made / "config.json").write_text('{"a": 1}')
    return made


@pytest.fixture
def signed(folder: Path, keys: tuple[Path, Path]) -> Path:
    """The same folder with its signature in it, as it is exported."""
    (folder / "model.sig").write_bytes(sign(folder, keys[0]))
    return folder


def _check(folder: Path, keys: tuple[Path, Path]) -> None:
    check(folder, (folder / "model.sig").read_bytes(), keys[1])


def test_what_was_signed_holds_here_and_for_the_library_itself(signed, keys) -> None:
    from model_signing import verifying

    _check(signed, keys)
    verifying.Config().use_elliptic_key_verifier(public_key=keys[1]).verify(signed, signed / "model.sig")


def flip(folder: Path) -> None:
    file = folder / "unet" / "weights.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


def rename(folder: Path) -> None:
    (folder / "config.json").rename(folder / "settings.json")


def add_link(folder: Path) -> None:
    (folder / "more.json").symlink_to(folder / "config.json")


def replace_by_link(folder: Path) -> None:
    outside = folder.parent / "outside.bin"
    (folder / "unet" / "weights.bin").rename(outside)
    (folder / "unet" / "weights.bin").symlink_to(outside)


def add(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("x") and None


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (flip, "Hash mismatch for 'unet/weights.bin'"),
        (rename, "Missing files in model 'flower': config.json"),
        (add("more.txt"), "Extra files found in model 'flower': more.txt"),
        (add_link, "more.json is a link to"),
        (add(".gitattributes"), r"Extra files found in model 'flower': \.gitattributes"),
        (add("extra.py"), r"Extra files found in model 'flower': extra\.py"),
        (replace_by_link, r"weights\.bin is a link to .*outside\.bin: no link is followed"),
    ],
)
def test_tampering_is_refused_with_the_file_named(signed, keys, tamper, reason) -> None:
    tamper(signed)

    with pytest.raises(DataError, match=reason):
        _check(signed, keys)


def _foreign(folder: Path, key: Path, ignored: list[str] = (), *, git: bool = True, links: bool = False) -> bytes:
    """A signature as `model_signing` alone makes it."""
    config = hashing.Config().set_ignored_paths(paths=[*ignored, "model.sig"], ignore_git_paths=git)
    place = folder.parent / "foreign.sig"
    maker = signing.Config().use_elliptic_key_signer(private_key=key)
    maker.set_hashing_config(config.set_allow_symlinks(links)).sign(folder, place)
    return place.read_bytes()


def test_a_foreign_signature_that_leaves_out_gits_files_holds_while_there_are_none(folder, keys) -> None:
    signature = _foreign(folder, keys[0])
    recorded = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    assert sorted(recorded["predicate"]["serialization"]["ignore_paths"]) == DEFAULTS
    check(folder, signature, keys[1])

    (folder / ".gitattributes").write_text("* filter=evil")
    with pytest.raises(DataError, match=r"'\.gitattributes': not covered by the signature"):
        check(folder, signature, keys[1])


def test_a_signature_over_shards_holds(folder, keys) -> None:
    place = folder.parent / "shards.sig"
    config = hashing.Config().use_shard_serialization(shard_size=1 << 20)
    config.set_ignored_paths(paths=["model.sig"], ignore_git_paths=False)
    signing.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(config).sign(folder, place)

    check(folder, place.read_bytes(), keys[1])
    flip(folder)
    with pytest.raises(DataError, match=r"weights\.bin"):
        check(folder, place.read_bytes(), keys[1])


def test_a_signature_that_leaves_out_more_is_refused(folder, keys) -> None:
    signature = _foreign(folder, keys[0], ["extra.py"])

    with pytest.raises(DataError, match=r"leaves out 'extra\.py': only"):
        check(folder, signature, keys[1])


def test_a_signature_that_allows_links_is_refused(folder, keys) -> None:
    signature = _foreign(folder, keys[0], links=True)

    with pytest.raises(DataError, match="allows links"):
        check(folder, signature, keys[1])


def test_a_folder_called_like_the_signature_hides_nothing(signed, keys) -> None:
    signature = (signed / "model.sig").read_bytes()
    (signed / "model.sig").unlink()
    (signed / "model.sig").mkdir()
    (signed / "model.sig" / "evil.py").write_text("x")

    with pytest.raises(DataError, match="is a folder"):
        check(signed, signature, keys[1])


def test_another_key_is_told(signed, tmp_path) -> None:
    _, other = _write_key(tmp_path, "bob", ec.generate_private_key(ec.SECP256R1()))

    with pytest.raises(DataError, match="Key mismatch"):
        check(signed, (signed / "model.sig").read_bytes(), other)


def test_a_changed_statement_is_told(signed, keys) -> None:
    bundle = json.loads((signed / "model.sig").read_bytes())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"flower", b"tulips")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()

    with pytest.raises(DataError, match="was changed since"):
        check(signed, json.dumps(bundle).encode(), keys[1])


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"dsseEnvelope": {"payload": "e30="}}', b"[" * 100_000])
def test_what_is_no_signature_is_refused(folder, keys, document) -> None:
    with pytest.raises(DataError, match="no signature in a Sigstore bundle"):
        check(folder, document, keys[1])


def test_keys_that_cannot_be_used_are_told(signed, keys, tmp_path) -> None:
    rsa_private, rsa_public = _write_key(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    for private in (rsa_private, encrypted, keys[1]):
        with pytest.raises(UsageError, match="holds no private key that can be used"):
            sign(signed, private)
    with pytest.raises(UsageError, match="holds no public key that can be used"):
        check(signed, (signed / "model.sig").read_bytes(), rsa_public)
    with pytest.raises(NotFoundError, match="No such file"):
        sign(signed, tmp_path / "nowhere.pem")


def test_without_the_packages_the_way_out_is_told(folder, keys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)

    with pytest.raises(UsageError, match=r"pip install 'modelgrove\[sign\]'"):
        sign(folder, keys[0])


# ---- models of a hub ------------------------------------------------------------------------


def test_a_signature_is_kept_with_the_revision_and_changes_nothing_of_it(hub: Hub, register, keys) -> None:
    revision = register("ann/flower")
    with hub.reading() as session:
        before = files_of(session, revision)

    name = sign_revision(hub, revision.id, keys[0])

    (found,) = check_revision(hub, revision.id, keys[1])
    assert (found.name, found.reason) == (name, "")
    with hub.reading() as session:
        after = find_revision(session, "ann/flower")
        assert (after.digest, files_of(session, after)) == (revision.digest, before)
    assert list(fsck(hub, full=True)) == []
    assert name not in {item.sha256 for item in find_garbage(hub)}
    assert list((hub.settings.home / "tmp").iterdir()) == []


def test_a_file_of_another_file_system_is_copied(hub: Hub, register, keys, monkeypatch) -> None:
    revision = register("ann/flower", referenced=True)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    sign_revision(hub, revision.id, keys[0])

    assert check_revision(hub, revision.id, keys[1])[0].reason == ""


def test_changed_bytes_in_the_store_are_found(hub: Hub, register, keys) -> None:
    revision = register("ann/flower")
    sign_revision(hub, revision.id, keys[0])
    with hub.reading() as session:
        place = hub.store.path(files_of(session, revision)[0]["sha256"])
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.chmod(0o644)
    place.write_bytes(content)

    assert "Hash mismatch for 'model.safetensors'" in check_revision(hub, revision.id, keys[1])[0].reason
    with pytest.raises(DataError, match=r"'model\.safetensors': not the bytes that were registered"):
        sign_revision(hub, revision.id, keys[0])


def test_a_model_without_signature_says_how_to_get_one(hub: Hub, register, keys) -> None:
    with pytest.raises(NotFoundError, match="modelgrove sign"):
        check_revision(hub, register("ann/flower").id, keys[1])


def _run(command, *arguments: object) -> None:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception


def _ingest(hub: Hub, folder: Path) -> str:
    (found,) = ingest(hub, [folder], "copy")
    assert found.outcome == "new", found.reason
    return found.name


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_signature_goes_out_with_the_model_and_comes_in_with_it(own_hub, tmp_path, keys, whole_folder) -> None:
    import torch
    from safetensors.torch import save_file

    made = tmp_path / "flower"
    made.mkdir()
    save_file({"weight": torch.ones(2, 3)}, made / "net.safetensors")
    if whole_folder:
        (made / "config.json").write_text("{}")
    name = _ingest(own_hub, made)
    _run(sign_command, name, "--key", keys[0])
    _run(check_signature, name, "--key", keys[1])
    _run(export, name, tmp_path / "out")
    _run(check_signature, "--folder", tmp_path / "out", "--key", keys[1])

    again = shutil.copytree(tmp_path / "out", tmp_path / "elsewhere" / "copy")
    (same,) = ingest(own_hub, [again], "copy")
    _run(check_signature, same.name, "--key", keys[1])
    with own_hub.reading() as session:
        first, second = find_revision(session, name), find_revision(session, same.name)
        assert first.digest == second.digest
        assert "model.sig" not in {file["path"] for file in files_of(session, second)}

    (tmp_path / "out" / "extra.py").write_text("x")
    with pytest.raises(DataError, match=r"extra\.py"):
        _run(check_signature, "--folder", tmp_path / "out", "--key", keys[1])
    with pytest.raises(UsageError, match="name a model"):
        _run(check_signature, "--key", keys[1])


def test_a_file_too_large_for_a_signature_is_refused_at_the_door(own_hub, folder) -> None:
    with (folder / "model.sig").open("wb") as file:
        file.truncate((16 << 20) + 1)
    (folder / "unet" / "weights.bin").rename(folder / "weights.bin")

    (found,) = ingest(own_hub, [folder], "copy")

    assert (found.outcome, "larger than 16 MiB" in found.reason) == ("refused", True)
