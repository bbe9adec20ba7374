"""Q-Diffusion as a plugin: learned rounding, stored ranges, and shortcuts in two parts."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.packed import matrix_of
from modelgrove_plugins.compress.q_diffusion import QDiffusion, QDiffusionParams, group_for

FILE = "out/unet/diffusion_pytorch_model.safetensors"
VALUES = {"smallest": 256, "pictures": 8, "steps": 4, "iterations": 40}


def packed(pipeline, folder, **values):
    report = run_plugin(QDiffusion(), [pipeline], folder, {**VALUES, **values}).report
    return report, manifest_of(folder / FILE), load_file(folder / FILE)


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_learning_loses_less_than_what_it_started_from(pipeline, tmp_path, start):
    errors = [
        packed(pipeline, tmp_path / f"{steps}", iterations=steps, start=start)[0]["fidelity"]["error"]
        for steps in (0, 60)
    ]
    assert errors[1] < errors[0]


def test_without_steps_weights_are_those_of_rounding_to_nearest(pipeline, tmp_path):
    report, manifest, stored = packed(pipeline, tmp_path, iterations=0, bits=8)
    name = "mid_block.resnets.0.conv1.weight"
    exact = matrix_of(load_file(pipeline.files()[FILE.removeprefix("out/")])[name]).float()
    codes = (exact / stored[f"{name}.scales"].float()).round()
    assert manifest.tensors[name].layout == "int8"
    assert torch.equal(stored[f"{name}.codes"].float(), codes)
    assert report["fidelity"]["error"] > 0


def test_a_shortcut_has_two_ranges_and_no_group_across(pipeline, tmp_path):
    report, manifest, stored = packed(pipeline, tmp_path, iterations=0)
    split = {layer["name"]: layer["split"] for layer in report["layers"] if "split" in layer}
    assert split == {
        f"unet/up_blocks.{block}.resnets.{place}.conv_shortcut.weight": sizes
        for block, place, sizes in ((0, 0, [32, 32]), (0, 1, [32, 16]), (1, 0, [32, 16]), (1, 1, [16, 16]))
    }
    entry = manifest.tensors["up_blocks.0.resnets.1.conv_shortcut.weight"]
    assert (entry.activations.groups, entry.activations.ranges, entry.group) == (2, "static", 16)
    name = "up_blocks.0.resnets.1.conv_shortcut.weight"
    assert stored[f"{name}.channels"].tolist() == [0] * 32 + [1] * 16
    low, high = stored[f"{name}.ranges"][0].unbind(-1)
    assert bool(((low <= 0) & (high >= 0)).all())
    assert not torch.equal(low[0], low[1])


@pytest.mark.parametrize(
    ("sizes", "bits", "width"),
    [((), 4, 64), ((160, 96), 4, 32), ((160, 160), 4, 40), ((128, 64), 4, 64), ((30, 18), 4, 64), ((160, 96), 8, None)],
)
def test_groups_divide_both_parts_where_a_multiple_of_eight_does(sizes, bits, width):
    assert group_for(sizes, QDiffusionParams(bits=bits)) == width


def test_sixteen_bits_of_activations_are_not_rounded(pipeline, tmp_path):
    _, manifest, stored = packed(pipeline, tmp_path, iterations=0, activation_bits=16)
    assert all(entry.activations is None for entry in manifest.tensors.values())
    assert not [name for name in stored if name.endswith(".ranges")]


def test_fewer_bits_of_activations_lose_more(pipeline, tmp_path):
    errors = [
        packed(pipeline, tmp_path / f"{bits}", iterations=0, bits=8, activation_bits=bits)[0]["fidelity"]["error"]
        for bits in (8, 6, 4)
    ]
    assert errors[0] < errors[1] / 4 < errors[2] / 16


def broken(pipeline, folder, name):
    source = pipeline.files()["model_index.json"].parent
    shutil.copytree(source, folder)
    file = folder / FILE.removeprefix("out/")
    tensors = load_file(file)
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, file)
    return FolderModel(folder, name="broken", family="zoo")


def test_a_weight_that_is_nan_is_named(pipeline, tmp_path):
    model = broken(pipeline, tmp_path / "model", "down_blocks.0.downsamplers.0.conv.weight")
    with pytest.raises(DataError, match=r"down_blocks\.0\.downsamplers\.0\.conv\.weight.*NaN"):
        packed(model, tmp_path / "job")


def test_a_model_that_cannot_paint_is_refused(pipeline, tmp_path):
    weights = FolderModel(pipeline.files()[FILE.removeprefix("out/")])
    with pytest.raises(UsageError, match="cannot paint"):
        run_plugin(QDiffusion(), [weights], tmp_path)


def test_the_same_seed_gives_the_same_file(pipeline, tmp_path):
    for name in ("one", "two"):
        packed(pipeline, tmp_path / name, iterations=3, fidelity=False)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
