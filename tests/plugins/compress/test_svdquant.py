"""SVDQuant as a plugin: files, plan, report, and a preview on its own kernels."""

import pytest
from safetensors.torch import load_file

from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.planning import plan
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.rtn import Rtn
from modelgrove_plugins.compress.svdquant import SvdQuant
from modelgrove_plugins.preview.diffusers import DiffusersPreviewer

VALUES = {"smallest": 256, "pictures": 4, "steps": 4, "rank": 4, "group_size": 32}


@pytest.fixture(scope="module")
def job(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("svdquant")
    return folder, run_plugin(SvdQuant(), [pipeline], folder / "job", VALUES).report


def test_four_bits_on_both_sides_lose_less_than_rounding(pipeline, job, tmp_path):
    _, report = job
    plain = run_plugin(
        Rtn(), [pipeline], tmp_path, {"smallest": 256, "bits": 4, "group_size": 32, "activation_bits": 4}
    )
    assert report["fidelity"]["error"] < plain.report["fidelity"]["error"] / 2
    split = [layer for layer in report["layers"] if "alpha" in layer]
    assert split
    assert all(layer["output_error"] < layer["output_error_rtn"] for layer in split)


def test_linear_layers_have_a_branch_and_convolutions_have_none(job):
    folder, _ = job
    manifest = manifest_of(folder / "job/out/unet/diffusion_pytorch_model.safetensors")
    for name, entry in manifest.tensors.items():
        linear = len(entry.shape) == 2
        assert (entry.rank > 0) == entry.smooth == linear, name
        assert entry.activations.bits == (4 if linear else 8)


def test_the_plan_is_what_becomes_of_it(pipeline, job):
    _, report = job
    planned = plan(SvdQuant, pipeline, VALUES)
    assert planned["bytes_after"] == report["bytes_after"]
    assert [layer["name"] for layer in planned["layers"]] == [layer["name"] for layer in report["layers"]]


def test_the_file_is_painted_on_the_kernels(job, tmp_path):
    folder, _ = job
    packed = FolderModel(folder / "job/out", name="packed", family="zoo")
    report = run_plugin(
        DiffusersPreviewer(), [packed], tmp_path, {"prompts": ["a"], "steps": 2, "quant": "packed"}
    ).report
    assert report["quantized"]["layers"] == len(
        manifest_of(packed.files()["unet/diffusion_pytorch_model.safetensors"]).tensors
    )


def test_the_same_seed_gives_the_same_file(pipeline, job, tmp_path):
    folder, _ = job
    run_plugin(SvdQuant(), [pipeline], tmp_path / "job", {**VALUES, "fidelity": False})
    one, two = (load_file(place / "job/out/unet/diffusion_pytorch_model.safetensors") for place in (folder, tmp_path))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
