"""Repairs after training: what vanishes, what is lost, and that the report says both."""

import pytest
import torch

from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.testing import FolderModel, check_plugin, run_plugin
from modelgrove_plugins.merge.orthogonal import Orthogonal

MODULE = "mid_block.attentions.0.proj_in"


def merge(models, folder, **params):
    result = run_plugin(Orthogonal(), models, folder, params)
    return result.report, FolderModel(folder / "out", adapter_type="lora")


@pytest.fixture
def related(make):
    """Two LoRAs of rank 4 on a layer 48×64 that read two input directions in common; and their exact updates."""
    generator = torch.Generator().manual_seed(0)
    down = torch.linalg.qr(torch.randn(64, 6, generator=generator))[0].T
    downs = [down[:4], down[2:]]
    ups = [torch.randn(48, 4, generator=generator) for _ in range(2)]
    models = [
        make.write(name, {f"unet.{MODULE}.lora_A.weight": down.contiguous(), f"unet.{MODULE}.lora_B.weight": up})
        for name, down, up in zip("ab", downs, ups, strict=True)
    ]
    return models, [up.double() @ down.double() for up, down in zip(ups, downs, strict=True)]


@pytest.mark.parametrize("repair", ["projection", "sequential", "output", "soft"])
def test_it_keeps_the_contract(repair):
    assert [check for check in check_plugin(Orthogonal, params={"repair": repair}) if not check.ok] == []


def test_projection_sums_what_neither_adapter_shares(related, tmp_path):
    models, (a, b) = related
    report, merged = merge(models, tmp_path / "job", weights=[1.0, 0.5])
    row_a, row_b = (torch.linalg.svd(update, full_matrices=False)[2][:4] for update in (a, b))
    wanted = a - a @ row_b.T @ row_b + 0.5 * (b - b @ row_a.T @ row_a)
    found = read_adapter(merged).modules[MODULE]
    # float32 against float64; directions in common are told apart at 1e-5.
    assert float((found.up.double() @ found.down.double() - wanted).norm() / wanted.norm()) < 1e-4


def test_projection_ends_the_crosstalk_and_tells_the_price(related, tmp_path):
    models, updates = related
    report, _ = merge(models, tmp_path / "job")
    [before], [after] = report["pairs"], report["pairs_after"]
    # Two of four directions in common: half of the smaller space.
    assert before["input_overlap"] == pytest.approx(0.5, abs=1e-3)
    assert before["crosstalk_of_b_on_a"] > 0.2
    assert after["crosstalk_of_b_on_a"] < 1e-5
    assert after["crosstalk_of_a_on_b"] < 1e-5
    for row, update, other in zip(report["adapters"], updates, updates[::-1], strict=True):
        shared = torch.linalg.svd(other, full_matrices=False)[2][:4]
        kept = float((update - update @ shared.T @ shared).square().sum() / update.square().sum())
        assert row["energy_kept"] == pytest.approx(kept, rel=1e-3)
        assert row["cosine_with_original"] == pytest.approx(kept**0.5, rel=1e-3)


def test_disjoint_adapters_are_only_added(make, tmp_path):
    eye = torch.eye(16)
    models = [
        make.write(
            name,
            {f"unet.{MODULE}.lora_A.weight": eye[place : place + 2], f"unet.{MODULE}.lora_B.weight": torch.randn(8, 2)},
        )
        for name, place in (("a", 0), ("b", 2))
    ]
    report, merged = merge(models, tmp_path / "job")
    assert [row["energy_kept"] for row in report["adapters"]] == [1.0, 1.0]
    total = sum(factors.up @ factors.down for model in models for factors in read_adapter(model).modules.values())
    found = read_adapter(merged).modules[MODULE]
    assert torch.allclose(found.up @ found.down, total, atol=1e-5)


def test_a_copy_loses_everything_and_the_report_warns(make, tmp_path):
    model, _ = make("a")
    report, merged = merge([model, model], tmp_path / "job")
    assert [row["energy_kept"] for row in report["adapters"]] == pytest.approx([0, 0], abs=1e-6)
    assert sum("keeps only 0%" in warning for warning in report["warnings"]) == 2
    assert all(float(factors.up.norm()) < 1e-3 for factors in read_adapter(merged).modules.values())


def test_one_adapter_alone_has_nothing_to_be_separated_from(make, tmp_path):
    model, updates = make("a")
    _, merged = merge([model], tmp_path / "job", weights=[0.5])
    for name, part in read_adapter(merged).modules.items():
        assert torch.allclose(part.up.double() @ part.down.double(), 0.5 * updates[name], atol=1e-5)


def test_what_one_adapter_alone_changes_is_kept_in_full(make, tmp_path):
    both, alone = "mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"
    a, first = make("a", shapes={both: (32, 32), alone: (32, 32)})
    b, _ = make("b", shapes={both: (32, 32)})
    report, _ = merge([a, b], tmp_path / "job")
    row = report["adapters"][0]
    # Both modules count; the one that is projected keeps less than all, the other one all.
    share = float(first[alone].square().sum() / sum(update.square().sum() for update in first.values()))
    assert share < row["energy_kept"] < 1
