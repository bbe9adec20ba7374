"""VQ4DiT as a plugin: files, plan, and what learning gains over k-means."""

from importlib.resources import as_file, files

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.planning import plan
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.packed import dequantized
from modelgrove_plugins.compress.vq4dit import Vq4Dit

FILE = "job/out/unet/diffusion_pytorch_model.safetensors"
VALUES = {"smallest": 1024, "bits": 3, "pictures": 1, "steps": 2, "iterations": 5}


@pytest.fixture(scope="module")
def job(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    return folder, run_plugin(Vq4Dit(), [pipeline], folder / "job", VALUES).report


def test_learned_codebooks_lose_less_than_k_means_in_the_same_bytes(tmp_path):
    """A block of a trained denoiser, at 2 bits; pictures that were not learned from."""
    values = {
        "bits": 2,
        "pictures": 8,
        "steps": 4,
        "skip": ["*up_blocks*", "*mid*", "*embed*", "*resnets*", "*down_blocks.2*"],
    }
    with as_file(files("modelgrove_analyzers.zoo") / "data/zoo-base") as folder:
        base = FolderModel(folder, name="zoo-base", family="zoo")
        plain, own = (
            run_plugin(Vq4Dit(), [base], tmp_path / str(steps), {**values, "iterations": steps}).report
            for steps in (0, 50)
        )
    assert own["bytes_after"] == plain["bytes_after"]
    assert own["fidelity"]["error"] < 0.9 * plain["fidelity"]["error"]
    assert all(0 < layer["moved"] < 0.5 for layer in own["layers"])
    assert all("moved" not in layer for layer in plain["layers"])


def test_the_plan_is_what_becomes_of_it(pipeline, job):
    _, report = job
    planned = plan(Vq4Dit, pipeline, VALUES)
    assert planned["bytes_after"] == report["bytes_after"]
    assert [layer["name"] for layer in planned["layers"]] == [layer["name"] for layer in report["layers"]]


@pytest.mark.parametrize(("bits", "code", "vector"), [(2, 8, 4), (3, 6, 2), (4, 8, 2)])
def test_codebooks_are_those_of_the_paper(bits, code, vector, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "linear.weight": torch.randn(64, 99, generator=generator),
        "conv.weight": torch.randn(32, 7, 3, 3).half(),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    run_plugin(
        Vq4Dit(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job",
        {"smallest": 0, "bits": bits, "iterations": 0},
    )  # fmt: skip
    manifest = manifest_of(tmp_path / "job/out/m.safetensors")
    assert {(entry.bits, entry.vector, entry.tables) for entry in manifest.tensors.values()} == {
        (code, vector, "tensor")
    }
    for name, found in dequantized(FolderModel(tmp_path / "job/out")):
        exact = tensors[name].float()
        assert found.shape == exact.shape
        # Gaussian weights at 2 bits cannot lose less than a quarter of their size, and no codebook loses a half.
        assert float((found.float() - exact).norm() / exact.norm()) < 0.5


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    save_file({"a.weight": torch.full((8, 8), torch.nan)}, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=r"a\.weight: NaN"):
        run_plugin(
            Vq4Dit(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"smallest": 0, "iterations": 0}
        )


def test_the_same_seed_gives_the_same_file(pipeline, tmp_path):
    values = {**VALUES, "iterations": 3, "pictures": 1, "fidelity": False}
    for name in ("one", "two"):
        run_plugin(Vq4Dit(), [pipeline], tmp_path / name / "job", values)
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
