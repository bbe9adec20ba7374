"""Sparse adapters: what is written is what is read, and what is broken is refused before it is unpacked."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import modelgrove_analyzers
from modelgrove_hub.errors import CorruptFileError, DataError, UsageError
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.recognise import recognise
from modelgrove_hub.formats.sara import INDICES, KEY, MASK, check_base, pack_places, unpack_places
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.testing import FolderModel

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
NAMES = {f"unet.{TO_Q}.weight": (6, 10), "unet.conv_in.weight": (4, 3, 3, 3), "unet.conv_in.bias": (4,)}


@st.composite
def subsets(draw):
    size = draw(st.integers(1, 3000))
    places = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=min(size, 80)))
    return np.array(sorted(places), np.int64), size


@given(subsets())
def test_places_come_back_and_take_the_smaller_form(case):
    places, size = case
    suffix, packed = pack_places(places, size)
    assert packed.nbytes <= min(4 * len(places), -(-size // 8))
    assert np.array_equal(unpack_places(suffix, packed, size, len(places)), places)


@settings(max_examples=300)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 12), min_size=1, max_size=8), st.integers(1, 10))
def test_indices_that_do_not_rise_within_the_tensor_are_refused(numbers, size):
    stored = np.array(numbers, np.int32)
    if numbers == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] < size:
        assert unpack_places(INDICES, stored, size, len(numbers)).tolist() == numbers
    else:
        with pytest.raises(ValueError, match="places that rise"):
            unpack_places(INDICES, stored, size, len(numbers))


@given(st.binary(min_size=1, max_size=20), st.integers(0, 160))
def test_a_mask_has_as_many_bits_as_values_and_none_behind_the_end(data, count):
    stored, size = np.frombuffer(data, np.uint8), 8 * len(data) - 5
    bits = [place for place in range(8 * len(data)) if data[place // 8] >> place % 8 & 1]
    if len(bits) == count and (not bits or bits[-1] < size):
        assert unpack_places(MASK, stored, size, count).tolist() == bits
    else:
        with pytest.raises(ValueError, match="places"):
            unpack_places(MASK, stored, size, count)


def origins(weights):
    return {
        name: {"shape": list(w.shape), "sha256": hashlib.sha256(w.numpy().tobytes()).hexdigest()}
        for name, w in weights.items()
    }


def make(path, changes=None, metadata=None, **tensors):
    """A file as docs/format.md has it, written without our writer; and what it adds."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in NAMES.items()}
    dense, stored = {}, {}
    for name, weight in weights.items():
        dense[name] = torch.randn(weight.shape) * (torch.rand(weight.shape) < 0.4)
        flat = dense[name].flatten()
        places = [place for place in range(len(flat)) if flat[place]]
        if len(flat) > 50:
            stored[f"{name}.sara_indices"] = torch.tensor(places, dtype=torch.int32)
        else:
            mask = bytearray(-(-len(flat) // 8))
            for place in places:
                mask[place // 8] |= 1 << place % 8
            stored[f"{name}.sara_mask"] = torch.tensor(list(mask), dtype=torch.uint8)
        stored[f"{name}.sara_values"] = flat[places]
    said = {"version": 1, "threshold": 0.5, "tensors": origins(weights)} | (changes or {})
    save_file({**stored, **tensors}, path, {KEY: json.dumps(said)} if metadata is None else metadata)
    return weights, dense


def test_updates_are_what_the_format_says(tmp_path):
    _, dense = make(tmp_path / "m.safetensors")
    found = open_updates(FolderModel(tmp_path / "m.safetensors"))
    assert found.targets.keys() == {TO_Q, "conv_in", "conv_in.bias"}
    assert found.unmatched == ()
    assert torch.equal(found.targets[TO_Q].read(), dense[f"unet.{TO_Q}.weight"])
    assert torch.equal(found.targets["conv_in"].read(), dense["unet.conv_in.weight"].flatten(1))
    assert torch.equal(found.targets["conv_in.bias"].read(), dense["unet.conv_in.bias"].view(1, 4))
    assert found.targets["conv_in"].kernel == (3, 3)
    assert {update.method for update in found.targets.values()} == {"sara"}


def test_it_is_recognised_with_its_base(tmp_path, monkeypatch):
    base = FolderModel(Path(modelgrove_analyzers.__file__).parent / "zoo/data/zoo-base")
    real = {tensor.name.replace("/", "."): tensor.shape for tensor in base.tensors()}
    monkeypatch.setitem(globals(), "NAMES", {name: real[name] for name in NAMES})
    make(tmp_path / "m.safetensors")
    found = recognise(list_model(tmp_path / "m.safetensors"))
    assert (found.kind, found.adapter_type, found.family, found.coverage) == ("adapter", "sara", "zoo", 1), (
        found.reasons
    )
    assert found.convention == "diffusers"


BROKEN = {
    "another version": ({"version": 2}, "version"),
    "no threshold": ({"threshold": 0}, "threshold"),
    "a huge shape": (
        {"tensors": {"unet.a.weight": {"shape": [2**20, 2**20], "sha256": "0" * 64}}},
        "too large",
    ),
    "a shape of nothing": ({"tensors": {"unet.a.weight": {"shape": [], "sha256": "0" * 64}}}, "shape"),
    "no hash": ({"tensors": {"unet.a.weight": {"shape": [2], "sha256": "0" * 63}}}, "sha256"),
    "a missing tensor": ({"tensors": {"unet.a.weight": {"shape": [2], "sha256": "0" * 64}}}, "needs"),
}


@pytest.mark.parametrize(("changes", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_manifest_is_refused_when_the_file_is_listed(tmp_path, changes, said):
    make(tmp_path / "m.safetensors", changes)
    with pytest.raises(DataError, match=said):
        list_model(tmp_path / "m.safetensors")


PARTS = {
    "a mask of another size": {"unet.conv_in.bias.sara_mask": torch.zeros(2, dtype=torch.uint8)},
    "indices of other numbers": {f"unet.{TO_Q}.weight.sara_indices": torch.zeros(3, dtype=torch.int64)},
    "values of integers": {"unet.conv_in.bias.sara_values": torch.zeros(2, dtype=torch.int32)},
    "more values than weights": {"unet.conv_in.bias.sara_values": torch.zeros(9)},
    "two forms of places": {"unet.conv_in.bias.sara_indices": torch.zeros(2, dtype=torch.int32)},
}


@pytest.mark.parametrize("tensors", PARTS.values(), ids=PARTS.keys())
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, tensors):
    make(tmp_path / "m.safetensors", **tensors)
    [name] = tensors
    for read in (list_model, lambda path: open_updates(FolderModel(path))):
        with pytest.raises(CorruptFileError, match=name.rpartition(".sara")[0]):
            read(tmp_path / "m.safetensors")


def test_places_and_values_are_checked_when_they_are_read(tmp_path):
    make(tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")[f"unet.{TO_Q}.weight.sara_indices"]
    twice = stored.clone()
    twice[1] = twice[0]
    make(tmp_path / "twice.safetensors", **{f"unet.{TO_Q}.weight.sara_indices": twice})
    with pytest.raises(CorruptFileError, match="sara_indices does not hold places that rise from 0 to 59"):
        open_updates(FolderModel(tmp_path / "twice.safetensors")).targets[TO_Q].read()
    nan = torch.full((len(stored),), float("nan"))
    make(tmp_path / "nan.safetensors", **{f"unet.{TO_Q}.weight.sara_values": nan})
    with pytest.raises(DataError, match="sara_values holds NaN"):
        open_updates(FolderModel(tmp_path / "nan.safetensors")).targets[TO_Q].read()


def test_without_a_manifest_it_is_refused_by_tensor(tmp_path):
    make(tmp_path / "m.safetensors", metadata={})
    with pytest.raises(DataError, match=r"sara_values is a sparse adapter's, but the metadata"):
        open_updates(FolderModel(tmp_path / "m.safetensors"))


def test_the_base_is_told_by_its_values_not_by_its_names_or_files(tmp_path):
    weights, _ = make(tmp_path / "m.safetensors")
    adapter = open_updates(FolderModel(tmp_path / "m.safetensors", name="mine"))

    def base(name, change):
        (tmp_path / name).mkdir()
        tensors = {key.removeprefix("unet."): change(weight) for key, weight in weights.items()}
        save_file(tensors, tmp_path / name / "diffusion_pytorch_model.safetensors")
        return FolderModel(tmp_path / name, name=name)

    check_base(adapter, base("same", torch.clone))
    check_base(adapter, base("wider", torch.Tensor.double))
    with pytest.raises(UsageError, match=r"mine changes single weights of another base than other: 3 of 3 .* conv_in"):
        check_base(adapter, base("other", lambda weight: weight + 1e-6))
    with pytest.raises(UsageError, match="of another base than narrow"):
        check_base(adapter, base("narrow", torch.Tensor.half))
