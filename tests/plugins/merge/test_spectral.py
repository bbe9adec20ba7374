"""Methods defined by singular directions: the same in the core as on whole matrices, by formulas written anew."""

import math

import pytest
import torch

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.testing import FolderModel, check_plugin, run_plugin
from modelgrove_plugins.merge.iso_c import IsoC
from modelgrove_plugins.merge.knots import Knots
from modelgrove_plugins.merge.legacy_linear import LegacyLinear
from modelgrove_plugins.merge.orthogonal import Orthogonal
from modelgrove_plugins.merge.sum import Sum
from modelgrove_plugins.merge.tsv import Tsv

MODULE = "mid_block.attentions.0.proj_in"
SHAPES = {MODULE: (48, 64), "down_blocks.0.attentions.0.proj_in": (40, 24)}
# Two float32 QRs, a product and two SVDs: hundreds of roundings of 6e-8.
EXACT = 2e-5

METHODS = {
    "tsv": (Tsv, {}),
    "knots": (Knots, {"density": 0.4}),
    "iso-c": (IsoC, {}),
    "projection": (Orthogonal, {"repair": "projection"}),
    "sequential": (Orthogonal, {"repair": "sequential"}),
    "output": (Orthogonal, {"repair": "output"}),
    "soft": (Orthogonal, {"repair": "soft"}),
}
methods = pytest.mark.parametrize(("plugin", "params"), METHODS.values(), ids=METHODS.keys())


def merge(plugin, models, folder, **params):
    result = run_plugin(plugin(), models, folder, params)
    found = read_adapter(FolderModel(folder / "out", adapter_type="lora")).modules
    return result.report, {name: part.up.double() @ part.down.double() for name, part in found.items()}


def assert_close(found, wanted, room=EXACT):
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert float((found[name] - exact).norm()) < room * max(float(exact.norm()), 1e-3), name


@methods
def test_they_keep_the_contract(plugin, params):
    assert [check for check in check_plugin(plugin, params=params) if not check.ok] == []
    assert get_plugin(f"merger.{plugin.name}") is plugin


@methods
def test_factors_of_the_same_updates_give_the_same(plugin, params, make, tmp_path):
    """(B·R, R⁻¹·A) is the same adapter."""
    parts = [make(name, 4, shapes=SHAPES) for name in "abc"]
    mixed = []
    for place, (model, _) in enumerate(parts):
        tensors = {}
        for name, part in read_adapter(model).modules.items():
            generator = torch.Generator().manual_seed(place)
            R = torch.randn(4, 4, generator=generator, dtype=torch.float64)
            tensors[f"unet.{name}.lora_A.weight"] = (R.inverse() @ part.down.double()).float()
            tensors[f"unet.{name}.lora_B.weight"] = (part.up.double() @ R).float()
        mixed.append(make.write(f"mixed-{place}", tensors))
    _, one = merge(plugin, [model for model, _ in parts], tmp_path / "one", **params)
    _, other = merge(plugin, mixed, tmp_path / "other", **params)
    # The second factors are rounded with a condition of up to hundreds; TIES may flip an entry at its threshold.
    assert_close(other, one, room=2e-3)


@methods
def test_the_order_matters_only_where_it_is_a_priority(plugin, params, make, tmp_path):
    models = [make(name, 4, shapes=SHAPES)[0] for name in "abc"]
    _, one = merge(plugin, models, tmp_path / "one", **params, weights=[1.0, 0.5, 2.0])
    _, other = merge(plugin, models[::-1], tmp_path / "other", **params, weights=[2.0, 0.5, 1.0])
    if params.get("repair") == "sequential":
        assert any(float((one[name] - other[name]).norm()) > 0.01 * float(one[name].norm()) for name in one)
    else:
        assert_close(other, one)


@methods
def test_what_one_adapter_alone_changes_is_only_weighted(plugin, params, make, tmp_path):
    (a, first), (b, second) = make("a", 4, shapes={MODULE: (48, 64)}), make("b", 4, shapes={"mid_block.x.0": (8, 9)})
    _, found = merge(plugin, [a, b], tmp_path / "job", **params, weights=[0.5, 2.0])
    assert_close(
        found, {name: 0.5 * update for name, update in first.items()} | {"mid_block.x.0": 2 * second["mid_block.x.0"]}
    )


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("knots", "iso-c", "tsv")] + ["tsv"])
def test_adapters_that_share_nothing_are_only_added(name, make, tmp_path):
    plugin, params = METHODS[name]
    eye = torch.eye(16)
    models, total = [], 0
    for place, label in enumerate("ab"):
        down = eye[4 * place : 4 * place + 2].clone()
        up = torch.zeros(8, 2)
        up[4 * place : 4 * place + 2] = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
        models.append(make.write(label, {f"unet.{MODULE}.lora_A.weight": down, f"unet.{MODULE}.lora_B.weight": up}))
        total = total + up.double() @ down.double()
    report, found = merge(plugin, models, tmp_path / "job", **params)
    assert_close(found, {MODULE: total})
    assert [row["energy_kept"] for row in report["adapters"]] == pytest.approx([1, 1], rel=1e-4)


def tsv_dense(updates, weights):
    U, V, S = [], [], []
    for X in updates:
        u, s, vt = torch.linalg.svd(X, full_matrices=False)
        keep = min(int((s > 1e-6 * s[0]).sum()), min(X.shape) // len(updates))
        U, V, S = [*U, u[:, :keep]], [*V, vt[:keep].T], [*S, s[:keep]]
    P, _, Qt = torch.linalg.svd(torch.cat(U, 1), full_matrices=False)
    R, _, Tt = torch.linalg.svd(torch.cat(V, 1), full_matrices=False)
    scale = torch.cat([weight * s for weight, s in zip(weights, S, strict=True)])
    return ((P @ Qt) * scale) @ (R @ Tt).T


def iso_dense(updates, weights):
    U, S, Vt = torch.linalg.svd(sum(w * X for w, X in zip(weights, updates, strict=True)), full_matrices=False)
    present = 1e-6 * S[0] < S
    return S[present].mean() * U[:, present] @ Vt[present]


def knots_dense(updates, weights, density=0.4):
    U, S, Vt = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
    present = 1e-6 * S[0] < S
    U, S, Vt = U[:, present], S[present], Vt[present]
    rights = []
    for right in Vt.split([X.shape[1] for X in updates], 1):
        order = right.abs().flatten().argsort(descending=True)[: max(1, int(density * right.numel()))]
        rights.append(
            torch.zeros(right.numel(), dtype=right.dtype).index_copy(0, order, right.flatten()[order]).view_as(right)
        )
    sign = sum(w * right for w, right in zip(weights, rights, strict=True)).sign()
    total, voices = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, right in zip(weights, rights, strict=True):
        agrees = ((w * right).sign() == sign) & (right != 0)
        total, voices = total + abs(w) * w * right * agrees, voices + abs(w) * agrees
    return (U * S) @ torch.where(voices > 0, total / voices.clamp_min(1e-30), 0.0)


def sequential_dense(updates, weights):
    total, seen = 0, torch.zeros(updates[0].shape[1], 0, dtype=torch.float64)
    for w, X in zip(weights, updates, strict=True):
        total = total + w * (X - X @ seen @ seen.T)
        rows = torch.linalg.svd(X, full_matrices=False)
        rank = int((rows[1] > 1e-6 * rows[1][0]).sum())
        seen = torch.linalg.qr(torch.cat([seen, rows[2][:rank].T], 1))[0]
    return total


def soft_dense(updates, weights):
    energies = [X.T @ X for X in updates]
    values, vectors = torch.linalg.eigh(sum(energies))
    read = values > 1e-9 * values[-1]
    root = (vectors[:, read] / values[read].sqrt()) @ vectors[:, read].T
    return sum(w * X @ root @ C @ root for w, X, C in zip(weights, updates, energies, strict=True))


def output_dense(updates, weights):
    total = 0
    for place, (w, X) in enumerate(zip(weights, updates, strict=True)):
        others = torch.cat([Y for other, Y in enumerate(updates) if other != place], 1)
        u, s, _ = torch.linalg.svd(others, full_matrices=False)
        basis = u[:, s > 1e-6 * s[0]]
        total = total + w * (X - basis @ basis.T @ X)
    return total


@pytest.mark.parametrize(
    ("name", "formula"),
    [("tsv", tsv_dense), ("iso-c", iso_dense), ("knots", knots_dense), ("sequential", sequential_dense),
     ("soft", soft_dense), ("output", output_dense)],
)  # fmt: skip
def test_the_core_gives_what_the_formula_gives_on_whole_matrices(name, formula, make, tmp_path):
    plugin, params = METHODS[name]
    parts = [make(label, 5, shapes=SHAPES) for label in "abc"]
    weights = [1.0, 0.5, 2.0]
    _, found = merge(plugin, [model for model, _ in parts], tmp_path / "job", **params, weights=weights)
    for module in SHAPES:
        wanted = formula([updates[module] for _, updates in parts], weights)
        # KnOTS: an entry at the threshold may fall on the other side, which moves some thousandths.
        room = 5e-3 if name == "knots" else EXACT
        assert float((found[module] - wanted).norm()) < room * float(wanted.norm()), module


def test_iso_c_keeps_the_directions_and_has_one_strength(make, tmp_path):
    models = [make(name, 4, shapes=SHAPES)[0] for name in "ab"]
    _, found = merge(IsoC, models, tmp_path / "job")
    for update in found.values():
        S = torch.linalg.svdvals(update)
        assert S[:8] == pytest.approx([float(S[0])] * 8, rel=1e-4)
        assert float(S[8]) < 1e-5 * float(S[0])


def test_two_copies_share_what_both_read(make, tmp_path):
    model, updates = make("a", 4, shapes=SHAPES)
    report, found = merge(Orthogonal, [model, model], tmp_path / "job", repair="soft")
    assert_close(found, updates)  # half of each
    assert [row["energy_kept"] for row in report["adapters"]] == pytest.approx([0.25, 0.25], rel=1e-3)


def test_the_first_of_a_sequence_is_whole(make, tmp_path):
    models = [make(name, 4, shapes=SHAPES)[0] for name in "ab"]
    report, _ = merge(Orthogonal, models, tmp_path / "job", repair="sequential")
    first, second = report["adapters"]
    assert first["energy_kept"] == pytest.approx(1, rel=1e-4)
    assert second["energy_kept"] < 0.99


def test_legacy_linear_is_wrong_by_the_known_amount_and_says_so(make, tmp_path):
    parts = [make(name, 16, shapes={MODULE: (256, 256)}) for name in "abc"]
    report, found = merge(LegacyLinear, [model for model, _ in parts], tmp_path / "job", weights=[0.5, 1.0, 2.0])
    ups, downs = [], []
    for (model, _), weight in zip(parts, [0.5, 1.0, 2.0], strict=True):
        [factors] = read_adapter(model).modules.values()
        ups.append(math.sqrt(weight) * factors.up.double())
        downs.append(math.sqrt(weight) * factors.down.double())
    assert_close(found, {MODULE: sum(ups) @ sum(downs)})
    assert report["distance_from_sum"] > 0.5
    report, _ = merge(LegacyLinear, [model for model, _ in parts], tmp_path / "even")
    # Two cross terms for each of three unrelated products.
    assert report["distance_from_sum"] == pytest.approx(math.sqrt(2), rel=0.1)


def test_legacy_linear_needs_equal_ranks(make, tmp_path):
    with pytest.raises(UsageError, match=r"different ranks \(4, 8\)"):
        merge(LegacyLinear, [make("a", 4)[0], make("b", 8)[0]], tmp_path / "job")


def test_a_sum_says_that_it_is_exact(make, tmp_path):
    report, _ = merge(Sum, [make("a", 4)[0], make("b", 8)[0]], tmp_path / "job")
    assert report["distance_from_sum"] == 0.0


def test_tsv_keeps_the_energy_and_separates_both_sides(make, tmp_path):
    generator = torch.Generator().manual_seed(0)
    down = torch.linalg.qr(torch.randn(64, 6, generator=generator))[0].T
    models = [
        make.write(
            name,
            {
                f"unet.{MODULE}.lora_A.weight": rows.contiguous(),
                f"unet.{MODULE}.lora_B.weight": torch.randn(48, 4, generator=generator),
            },
        )
        for name, rows in (("a", down[:4]), ("b", down[2:]))
    ]
    report, _ = merge(Tsv, models, tmp_path / "job")
    [before], [after] = report["pairs"], report["pairs_after"]
    # Directions that are exactly shared cannot be separated: each adapter keeps its half of them.
    assert after["input_overlap"] < before["input_overlap"] + 1e-6
    assert all(row["cosine_with_original"] < 1 for row in report["adapters"])


def test_tsv_of_unrelated_adapters_is_orthogonal_and_lossless(make, tmp_path):
    models = [make(name, 4)[0] for name in "abc"]
    report, _ = merge(Tsv, models, tmp_path / "job")
    for pair in report["pairs_after"]:
        assert pair["input_overlap"] < 1e-6
        assert pair["output_overlap"] < 1e-6
        assert abs(pair["cosine"]) < 1e-6
    assert [row["energy_kept"] for row in report["adapters"]] == pytest.approx([1, 1, 1], rel=1e-4)
    assert all(row["cosine_with_original"] < 1 for row in report["adapters"])
