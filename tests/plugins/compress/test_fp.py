"""FP8 and FP4 as a plugin: files, plan, learned rounding."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.planning import plan
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.fp import Fp

FILE = "job/out/unet/diffusion_pytorch_model.safetensors"
VALUES = {"smallest": 256, "pictures": 8, "steps": 2, "iterations": 120}


@pytest.fixture(scope="module")
def job(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp")
    return folder, run_plugin(Fp(), [pipeline], folder / "job", VALUES).report


def test_learned_rounding_loses_less_than_the_nearest_in_the_same_bytes(pipeline, job, tmp_path):
    _, report = job
    nearest = run_plugin(Fp(), [pipeline], tmp_path / "job", {**VALUES, "iterations": 0}).report
    assert report["bytes_after"] == nearest["bytes_after"]
    assert report["fidelity"]["error"] < nearest["fidelity"]["error"]
    grids = [load_file(place / FILE) for place in (job[0], tmp_path)]
    kept = [name for name in grids[0] if name.endswith((".table", ".scales"))]
    assert kept
    assert all(grids[0][name].equal(grids[1][name]) for name in kept)


def test_the_plan_is_what_becomes_of_it(pipeline, job):
    _, report = job
    planned = plan(Fp, pipeline, VALUES)
    assert planned["bytes_after"] == report["bytes_after"]
    assert [layer["name"] for layer in planned["layers"]] == [layer["name"] for layer in report["layers"]]


def test_layers_say_their_format(job):
    assert {layer["format"] for layer in job[1]["layers"]} <= {"e1m2", "e2m1", "e3m0"}


def test_eight_bits_and_groups_of_a_model_that_cannot_paint(tmp_path):
    save_file({"a.weight": torch.randn(32, 48)}, tmp_path / "m.safetensors")
    errors = []
    for values in ({"bits": 4}, {"bits": 4, "group_size": 16}, {"bits": 8}):
        out = tmp_path / str(len(errors))
        run_plugin(Fp(), [FolderModel(tmp_path / "m.safetensors")], out, {"smallest": 0, "iterations": 0, **values})
        entry = manifest_of(out / "out/m.safetensors").tensors["a.weight"]
        assert (entry.bits, entry.group) == (values["bits"], values.get("group_size", 48))
        errors.append(entry.error)
    assert errors == sorted(errors, reverse=True)


def test_inputs_of_fp8_are_in_the_manifest_and_in_the_comparison(pipeline, tmp_path):
    values = {"smallest": 256, "bits": 8, "iterations": 0}
    plain, both = (
        run_plugin(Fp(), [pipeline], tmp_path / str(name) / "job", {**values, "activation_format": name}).report
        for name in (None, "e5m2")
    )
    entries = manifest_of(tmp_path / "e5m2" / FILE).tensors.values()
    assert {(entry.activations.bits, entry.activations.exponent) for entry in entries} == {(8, 5)}
    # Two bits of mantissa lose more than the weights' best format.
    assert both["fidelity"]["error"] > 2 * plain["fidelity"]["error"]
    assert both["bytes_after"] == plain["bytes_after"]


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    save_file({"a.weight": torch.full((8, 8), torch.inf)}, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=r"a\.weight: NaN"):
        run_plugin(Fp(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"smallest": 0, "iterations": 0})


def test_the_same_seed_gives_the_same_file(pipeline, tmp_path):
    values = {**VALUES, "iterations": 3, "pictures": 1, "fidelity": False}
    for name in ("one", "two"):
        run_plugin(Fp(), [pipeline], tmp_path / name / "job", values)
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
