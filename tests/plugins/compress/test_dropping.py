"""Blocks dropped by HierarchicalPrune and A-SDM: what stays is an ordinary model that paints."""

import pytest
from diffusers import UNet2DConditionModel

from modelgrove_hub.contracts import Cancelled
from modelgrove_hub.errors import UsageError
from modelgrove_hub.tables import Relation
from modelgrove_hub.testing import FolderModel, LocalContext, run_plugin
from modelgrove_plugins.compress.a_sdm import ASdm
from modelgrove_plugins.compress.hierarchical import Hierarchical, HierarchicalParams
from modelgrove_plugins.preview.diffusers import DiffusersPreviewer

VALUES = {"pictures": 2, "steps": 2}


@pytest.fixture(scope="module")
def pruned(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hierarchical")
    values = {**VALUES, "keep": 0.9, "iterations": 30}
    return folder / "job/out", run_plugin(Hierarchical(), [pipeline], folder / "job", values)


def test_late_blocks_go_until_the_size_is_reached(pruned):
    _, result = pruned
    report = result.report
    assert report["removed"]
    assert report["parameters_after"] <= 0.9 * report["parameters_before"]
    places = {unit["name"]: unit["position"] for unit in report["units"]}
    assert all(places[name] >= 0.5 for name in report["removed"])
    assert report["bytes_after"] < report["bytes_before"]
    assert result.outputs[0].relation == Relation.DISTILLED


def test_learning_mends_some_of_it(pruned):
    _, result = pruned
    assert result.report["error_distilled"] < result.report["error_removed"]
    assert result.report["fidelity"]["error"] > 0


def test_the_result_loads_in_diffusers_and_paints(pruned, tmp_path):
    out, result = pruned
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    assert sum(weight.numel() for weight in unet.parameters()) == result.report["parameters_after"]
    model = FolderModel(out, name="pruned", family="zoo")
    run_plugin(DiffusersPreviewer(), [model], tmp_path, {"prompts": ["a"], "steps": 2})


def test_early_blocks_do_not_learn(pipeline, pruned):
    out, _ = pruned
    before = UNet2DConditionModel.from_pretrained(pipeline.files()["unet/config.json"].parent).state_dict()
    after = UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    assert all(before[name].equal(after[name]) for name in after if name.startswith(("down_blocks.0", "conv_in")))
    assert any(not before[name].equal(after[name]) for name in after if name.startswith("up_blocks.1"))


def test_what_is_redundant_depends_on_the_tolerance(pipeline, tmp_path):
    values = {**VALUES, "iterations": 0, "fidelity": False}
    some = run_plugin(ASdm(), [pipeline], tmp_path / "some", {**values, "tolerance": 0.05}).report
    more = run_plugin(ASdm(), [pipeline], tmp_path / "more", {**values, "tolerance": 0.3}).report
    assert some["error_removed"] <= 0.05
    assert more["error_removed"] <= 0.3
    assert more["parameters_after"] < some["parameters_after"]
    assert some["error_distilled"] is None
    assert len(some["units"]) == len(more["units"])


def test_nothing_redundant_is_said(pipeline, tmp_path):
    with pytest.raises(UsageError, match="no block may go"):
        run_plugin(ASdm(), [pipeline], tmp_path, {**VALUES, "tolerance": 1e-9})


def test_a_cancel_stops_the_learning(pipeline, tmp_path):
    with pytest.raises(Cancelled), LocalContext(tmp_path, [pipeline], cancel_after=12) as context:
        Hierarchical().run(context, HierarchicalParams(**VALUES, keep=0.9, iterations=50))
