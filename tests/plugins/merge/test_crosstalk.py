"""The report before a merge: what it measures from weights, what the base answers, and what it concludes."""

import xml.etree.ElementTree as ET

import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.errors import UsageError
from modelgrove_hub.testing import FolderModel, check_plugin, run_plugin
from modelgrove_plugins.merge.crosstalk import PLOT, Crosstalk
from modelgrove_plugins.merge.verdicts import CURVE, damage, verdict

SHAPES = {"down_blocks.1.attentions.0.proj_in": (32, 32), "up_blocks.0.resnets.0.conv1": (16, 8, 3, 3)}


def report(models, folder, **params):
    return run_plugin(Crosstalk(), models, folder, params).report


def test_it_keeps_the_contract(make):
    models = [make(name)[0] for name in "ab"]
    assert [check for check in check_plugin(Crosstalk, models) if not check.ok] == []


def test_the_sum_of_blocks_and_pairs_is_told_without_writing_a_model(make, tmp_path):
    parts = [make(name, 4, shapes=SHAPES) for name in "ab"]
    result = run_plugin(Crosstalk(), [model for model, _ in parts], tmp_path / "job", {"weights": [0.5, 2.0]})
    found = result.report
    assert result.outputs == ()
    [pair] = found["pairs"]
    assert set(found["blocks"]) == {"unet down_blocks.1", "unet up_blocks.0"}
    total = sum(
        float((0.5 * parts[0][1][name] + 2.0 * parts[1][1][name]).square().sum()) for name in SHAPES
    )  # fmt: skip
    # Five digits are reported.
    assert found["norm"] == pytest.approx(total**0.5, rel=1e-4)
    squares = [sum(float(X.square().sum()) for X in updates.values()) for _, updates in parts]
    assert found["norm_if_independent"] == pytest.approx((0.25 * squares[0] + 4 * squares[1]) ** 0.5, rel=1e-4)
    assert pair["shared_modules"] == 2
    assert not list((tmp_path / "job/out").rglob("*.safetensors"))


def test_the_picture_has_a_cell_for_every_direction_and_block(make, tmp_path):
    models = [make(name, 4, shapes=SHAPES)[0] for name in ("a", "b", "<c>")]
    report(models, tmp_path / "job")
    root = ET.fromstring((tmp_path / "job/out" / PLOT).read_text("utf-8"))  # well-formed, with any name
    cells = [element for element in root.iter() if element.tag.endswith("title")]
    assert len(cells) == 6 * (1 + 2)
    assert any("<c>" in (cell.text or "") for cell in cells)


def test_disjoint_adapters_are_called_so_and_simply_summed(make, tmp_path):
    models = [make("a", shapes={"mid_block.x": (8, 8)})[0], make("b", shapes={"mid_block.y": (8, 8)})[0]]
    found = report(models, tmp_path / "job")
    assert found["pairs"][0]["verdict"] == "disjoint"
    assert found["suggestion"]["method"] == "sum"


def test_a_copy_disturbs_much(make, tmp_path):
    model, _ = make("a", 4, shapes=SHAPES)
    found = report([model, model], tmp_path / "job")
    assert found["pairs"][0]["crosstalk_of_b_on_a"] == 1.0
    assert found["pairs"][0]["verdict"] == "much"


def test_the_curve_rises_and_is_met_at_its_points():
    for crosstalk, expected in CURVE:
        pair = {"crosstalk_of_b_on_a": crosstalk, "crosstalk_of_a_on_b": 0.0}
        assert damage(pair) == pytest.approx(expected)
    assert [y for _, y in CURVE] == sorted(y for _, y in CURVE)
    beyond = {"crosstalk_of_b_on_a": 99.0, "crosstalk_of_a_on_b": 0.0}
    assert damage(beyond) == CURVE[-1][1]


def test_what_the_base_showed_rules_the_verdict():
    pair = {"shared_modules": 3, "crosstalk_of_b_on_a": 2.0, "crosstalk_of_a_on_b": 2.0}
    assert verdict(pair) == "much"
    assert verdict(pair | {"damage_of_b_on_a": 0.1, "damage_of_a_on_b": 0.2}) == "little"


def test_without_a_base_it_says_that_none_was_asked(make, tmp_path):
    found = report([make(name)[0] for name in "ab"], tmp_path / "job")
    assert "no base" in found["asked"]
    assert "damage_of_b_on_a" not in found["pairs"][0]


def test_a_checkpoint_is_refused_by_name(make, tmp_path):
    save_file({"x.weight": torch.ones(4, 4)}, tmp_path / "whole.safetensors")
    with pytest.raises(UsageError, match="whole is no adapter"):
        report([make("a")[0], FolderModel(tmp_path / "whole.safetensors")], tmp_path / "job")


def test_weights_must_fit(make, tmp_path):
    with pytest.raises(UsageError, match="as many weights"):
        report([make("a")[0], make("b")[0]], tmp_path / "job", weights=[1.0])


def test_the_base_is_asked_and_a_silent_adapter_does_no_damage(sample, tmp_path):
    base, (loud, other) = sample
    tensors = {f"unet.{name}": torch.zeros(shape) for name, shape in silent_shapes(loud).items()}
    save_file(tensors, tmp_path / "silent.safetensors")
    silent = FolderModel(tmp_path / "silent.safetensors", name="silent", adapter_type="lora")
    found = report([loud, other, silent, base], tmp_path / "job", base=True, prompts=["a red apple"])
    assert found["asked"] == base.name
    pairs = {(pair["a"], pair["b"]): pair for pair in found["pairs"]}
    assert 0.05 < pairs[loud.name, other.name]["damage_of_b_on_a"] < 20
    assert pairs[loud.name, "silent"]["damage_of_b_on_a"] < 1e-6
    assert found["suggestion"]["method"] != "sum"


def silent_shapes(model):
    from modelgrove_hub.formats.adapters import read_adapter

    shapes = {}
    for name, part in read_adapter(model).modules.items():
        shapes |= {f"{name}.lora_A.weight": (1, part.down.shape[1]), f"{name}.lora_B.weight": (part.up.shape[0], 1)}
    return shapes
