"""Pickles in all their wrappings are told by their bytes, and never run."""

import io
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.pickles import inspect_pickle, looks_like_pickle
from modelgrove_hub.formats.recognise import recognise


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/modelgrove-was-here",)


def saved(value, **how):
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    return stream.getvalue()


def archive(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return stream.getvalue()


def tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        made.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


WEIGHTS = {"a": torch.zeros(3)}
WRAPPED = {
    "torch zip archive": saved(WEIGHTS),
    "torch's legacy format": saved(WEIGHTS, _use_new_zipfile_serialization=False),
    "tar archive of torch's first format": tar(),
    "zip archive without torch's data.pkl": archive(readme="hello"),
    "damaged zip archive": saved(WEIGHTS)[:-30] + saved(WEIGHTS)[-22:],
    "zip archive with an oversized directory": b"PK\x03\x04" + bytes(100),
}


def inspect(data):
    return inspect_pickle(io.BytesIO(data), len(data))


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_wrapping_is_told_by_its_bytes(wrapping):
    data = WRAPPED[wrapping]
    assert looks_like_pickle(io.BytesIO(data), len(data))
    assert inspect(data).wrapping == wrapping


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_of_every_protocol_is_told_and_names_what_it_imports(protocol):
    data = pickle.dumps({"weights": Evil()}, protocol=protocol)
    assert looks_like_pickle(io.BytesIO(data), len(data))
    assert inspect(data).imports == (f"{os.mkdir.__module__}.mkdir",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pkl", "model", "model.bin"])
@pytest.mark.parametrize("data", [saved({"w": Evil()}), pickle.dumps(Evil()), WRAPPED["torch's legacy format"]])
def test_a_pickle_under_any_name_is_quarantined_and_not_run(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    found = recognise(list_model(tmp_path / name))
    assert (found.trust, found.kind, found.family) == ("quarantined", "unknown", "unknown")
    assert not os.path.exists("/tmp/modelgrove-was-here")  # noqa: PTH110


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.onnx"])
@pytest.mark.parametrize("data", [saved({"w": Evil()}), pickle.dumps(Evil(), 0), tar(), archive(readme="hello")])
def test_a_pickle_that_claims_to_be_another_format_is_refused_as_a_pickle(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptFileError, match="is a pickle"):
        list_model(tmp_path / name)


def test_only_safetensors_start_like_a_pickle_by_chance(tmp_path):
    # A header of 0x0280 bytes: the file starts with 80 02, the mark of pickle's protocol 2.
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x280)
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert list_model(path).format == "safetensors"


@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x04", b"(", bytes(257) + b"ustar"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_inspected_without_a_crash(data, start):
    data = start + data
    if looks_like_pickle(io.BytesIO(data), len(data)):
        assert inspect(data).wrapping


NUMBERED = {"first": {"threshold": 2e-3}, "missing": {}}


@pytest.mark.parametrize("before", NUMBERED.values(), ids=NUMBERED.keys())
def test_vectors_by_number_are_told_to_be_what_sara_trained(tmp_path, before):
    mask = torch.ones(70_000, requires_grad=True)
    (tmp_path / "sara.pt").write_bytes(saved(before | {0: mask[mask > 0], 1: torch.ones(300)}))
    found = recognise(list_model(tmp_path / "sara.pt"))
    assert (found.kind, found.adapter_type, found.trust) == ("adapter", "sara", "quarantined")
    assert "--method sara --threshold T" in found.reasons[0]


@pytest.mark.parametrize(
    "value",
    [
        {0: torch.ones(3, 3), 1: torch.ones(3)},
        {1: torch.ones(3), 2: torch.ones(3)},
        {"a": torch.ones(3), 0: torch.ones(3)},
        [torch.ones(3)],
    ],
    ids=["matrices", "from one", "by name", "a list"],
)
def test_other_tensors_are_not(tmp_path, value):
    (tmp_path / "other.pt").write_bytes(saved(value))
    assert recognise(list_model(tmp_path / "other.pt")).adapter_type is None
