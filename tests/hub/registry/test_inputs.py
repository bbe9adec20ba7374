"""What a plugin is given is what was registered, or an error that says why not."""

from __future__ import annotations

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError, NotFoundError, StorageError, UnsafeFileError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.inputs import RegisteredModel, load_input
from modelgrove_hub.registry.models import add_revision, remove
from modelgrove_hub.tables import Blob, Model, Revision


@pytest.mark.parametrize("referenced", [False, True])
def test_a_plugin_reads_facts_tensors_and_metadata(hub: Hub, register, referenced: bool) -> None:
    revision = register("zoo/apple", 2.5, referenced=referenced)

    model = load_input(hub, revision.id)

    assert (model.name, model.family, model.adapter_type, model.revision_id) == (
        "zoo/apple",
        "sd1",
        "lora",
        revision.id,
    )
    assert (model.summary["rank"], model.card, list(model.tags)) == ([4], "A card.", ["test"])
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in model.tensors()] == [("weight", "F32", (2, 3))]
    assert torch.equal(next(model.tensors()).read(), torch.full((2, 3), 2.5))
    assert model.metadata() == {"name": "zoo/apple"}
    assert list(model.files()) == ["model.safetensors"]


def test_a_referenced_file_is_read_where_it_lies(hub: Hub, register, tmp_path: Path) -> None:
    revision = register("zoo/apple", referenced=True)

    assert load_input(hub, revision.id).files()["model.safetensors"] == tmp_path / "files" / "zoo-apple.safetensors"


def test_the_hash_of_a_file_is_the_registrys_and_computed_without_one(hub: Hub, register) -> None:
    model = load_input(hub, register("zoo/apple", referenced=True).id)
    wanted = sha256(model.files()["model.safetensors"].read_bytes()).hexdigest()

    assert model.hashes == {"model.safetensors": wanted}
    assert model.sha256("model.safetensors") == wanted
    assert replace(model, hashes={}).sha256("model.safetensors") == wanted


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_referenced_file_that_changed_is_refused(hub: Hub, register, tmp_path: Path, change: str) -> None:
    revision = register("zoo/apple", referenced=True)
    file = tmp_path / "files" / "zoo-apple.safetensors"
    status = file.stat()
    if change == "size":
        file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, ns=(0, status.st_mtime_ns + (change == "time")))

    with pytest.raises(DataError, match=r"zoo-apple\.safetensors has changed.*modelgrove fsck"):
        load_input(hub, revision.id)


def test_a_referenced_file_that_is_gone_is_named(hub: Hub, register, tmp_path: Path) -> None:
    revision = register("zoo/apple", referenced=True)
    (tmp_path / "files" / "zoo-apple.safetensors").unlink()

    with pytest.raises(StorageError, match=r"zoo-apple\.safetensors.*modelgrove fsck"):
        load_input(hub, revision.id)


def test_a_quarantined_model_is_never_read(hub: Hub, register) -> None:
    bad = register("zoo/bad", 1.0, trust="quarantined")
    register("zoo/bad", 2.0, trust="ok")  # a clean revision does not clean the older one

    with pytest.raises(UnsafeFileError, match="it says so"):
        load_input(hub, bad.id)


def test_a_model_quarantined_by_hand_is_not_read(hub: Hub, register) -> None:
    revision = register("zoo/apple")
    with hub.transaction() as session:
        session.get(Model, revision.model_id).trust = "quarantined"

    with pytest.raises(UnsafeFileError, match="zoo/apple is quarantined"):
        load_input(hub, revision.id)


def test_a_removed_revision_is_not_found(hub: Hub, register) -> None:
    revision = register("zoo/apple")
    with hub.transaction() as session:
        remove(session, "zoo/apple")

    with pytest.raises(NotFoundError, match="its model was removed"):
        load_input(hub, revision.id)


def test_several_weight_files_follow_each_other_by_path(hub: Hub, register) -> None:
    files = {
        f"{name}.safetensors": _file_of(hub, register(f"zoo/{name}", fill)) for name, fill in (("b", 2.0), ("a", 1.0))
    }
    revision = _register_files(hub, files)

    model = load_input(hub, revision.id)

    assert [float(tensor.read()[0, 0]) for tensor in model.tensors()] == [1.0, 2.0]
    assert model.metadata()["name"] == "zoo/a"


def test_a_model_without_safetensors_says_what_it_holds(hub: Hub) -> None:
    blob = hub.store.put_bytes(b"GGUF")
    with hub.transaction() as session:
        session.add(Blob(sha256=blob.sha256, size=blob.size))
    model = load_input(hub, _register_files(hub, {"model.gguf": blob.sha256}).id)

    with pytest.raises(DataError, match=r"only model\.gguf"):
        next(model.tensors())
    assert list(model.files()) == ["model.gguf"]


def _file_of(hub: Hub, revision: Revision) -> str:
    return load_input(hub, revision.id).files()["model.safetensors"].name


def _register_files(hub: Hub, files: dict[str, str]) -> Revision:
    with hub.transaction() as session:
        return add_revision(
            session, name="zoo/several", files=files, manifests={}, kind="checkpoint", family="sd1", adapter_type=None,
            declared_base=None, licence=None, tags=[], card="", trust="ok", summary={}, weights_hash=None,
            values_hash=None, inventory_hash=None, parameters=12, size=0,
        )[1]  # fmt: skip


def test_spare_copies_of_a_part_are_not_read_beside_it(tmp_path: Path) -> None:
    names = [
        f"{part}/diffusion_pytorch_model{precision}.safetensors"
        for part in ("unet", "vae")
        for precision in ("", ".fp16")
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        # In a store the files have no suffix.
        save_file({"weight": torch.full((2,), float(".fp16" not in name))}, tmp_path / name.replace(".", "_"))
    paths = {name: tmp_path / name.replace(".", "_") for name in names}
    model = RegisteredModel("zoo/base", "zoo", None, 1, {}, "", (), paths)

    tensors = list(model.tensors())

    assert [tensor.name for tensor in tensors] == ["unet/weight", "vae/weight"]
    assert all(tensor.read().tolist() == [1.0, 1.0] for tensor in tensors)


def test_what_ingest_measured_is_read_from_manifests_alone(tmp_path: Path) -> None:
    from modelgrove_hub.store.manifest import scan

    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 3)}, file)
    measured = scan(file)
    (tmp_path / "manifest").write_text(measured.to_json(), "utf-8")
    file.unlink()

    model = RegisteredModel(
        "net", "tiny", None, 1, {}, "", (), {file.name: file}, manifests={file.name: tmp_path / "manifest"}
    )

    assert model.scans() == {file.name: measured}


def test_a_registered_model_knows_its_manifests(hub: Hub, register) -> None:
    model = load_input(hub, register("zoo/apple").id)

    assert {path: file.read_bytes() for path, file in model.manifests.items()} == {
        "model.safetensors": b"manifest of zoo/apple 1.0"
    }
