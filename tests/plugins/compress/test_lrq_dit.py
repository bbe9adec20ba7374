"""LRQ-DiT as a plugin: files, rotations, report."""

from importlib.resources import as_file, files

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels import spreading
from modelgrove_plugins.compress.lrq_dit import LrqDit
from modelgrove_plugins.compress.packed import dequantized

FILE = "job/out/unet/diffusion_pytorch_model.safetensors"
VALUES = {"smallest": 256, "pictures": 2, "steps": 2, "block": 16}


@pytest.fixture(scope="module")
def job(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lrq")
    return folder, run_plugin(LrqDit(), [pipeline], folder / "job", VALUES).report


def test_linear_layers_are_rotated_and_convolutions_are_not(job):
    folder, report = job
    for name, entry in manifest_of(folder / FILE).tensors.items():
        assert (entry.layout, entry.bits, entry.tables) == ("lut", 4, "row")
        assert (entry.rotation is not None) == (len(entry.shape) == 2), name
    assert all("fluctuation" in layer for layer in report["layers"] if layer["name"].startswith("unet/"))


def test_it_loses_less_than_equal_steps_a_row(tmp_path):
    """Trained weights, that is: those of an untrained model are spread evenly."""
    with as_file(files("modelgrove_analyzers.zoo") / "data/zoo-base") as folder:
        base = FolderModel(folder, name="zoo-base", family="zoo")
        values = {
            "rotation": "none",
            "bits": 3,
            "fidelity": False,
            "skip": ["*_blocks*conv*", "*mid*", "*embed*", "*up*"],
        }
        report = run_plugin(LrqDit(), [base], tmp_path / "job", values).report
    errors = [(10 ** (-layer["sqnr_db"] / 20), layer["error_uniform"]) for layer in report["layers"]]
    assert all(twin < uniform for twin, uniform in errors)


def test_rotations_of_their_own_are_stored_and_undone(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(spreading, "THRESHOLD", 0.0)
    report = run_plugin(LrqDit(), [pipeline], tmp_path / "job", VALUES).report
    entries = manifest_of(tmp_path / FILE).tensors
    assert {entry.rotation for entry in entries.values() if len(entry.shape) == 2} >= {"stored"}
    back = dict(dequantized(FolderModel(tmp_path / "job/out")))
    exact = {tensor.name: tensor.read() for tensor in pipeline.tensors()}
    for layer in report["layers"]:
        name = layer["name"].partition("/")[2]
        whole = exact[layer["name"]].float()
        assert float((back[name].float() - whole).norm() / whole.norm()) < 0.25
    assert report["fidelity"]["error"] < 0.2


def test_a_model_that_cannot_paint_is_packed_without_rotations(tmp_path):
    save_file({"a.weight": torch.randn(64, 64), "b.weight": torch.zeros(64, 64)}, tmp_path / "m.safetensors")
    values = {"smallest": 0, "rotation": "none", "activation_bits": None}
    run_plugin(LrqDit(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", values)
    entry = manifest_of(tmp_path / "job/out/m.safetensors").tensors["a.weight"]
    assert (entry.rotation, entry.activations) == (None, None)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    save_file({"a.weight": torch.full((8, 8), torch.nan)}, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=r"a\.weight: NaN"):
        run_plugin(
            LrqDit(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"smallest": 0, "rotation": "none"}
        )


def test_the_same_seed_gives_the_same_file(pipeline, job, tmp_path):
    folder, _ = job
    run_plugin(LrqDit(), [pipeline], tmp_path / "job", {**VALUES, "fidelity": False})
    one, two = (load_file(place / FILE) for place in (folder, tmp_path))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
