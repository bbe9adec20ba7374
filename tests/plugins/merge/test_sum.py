"""The exact sum against dense float64 arithmetic and against peft."""

import json
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from modelgrove_hub.contracts import Cancelled
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.recipes import recipe_of
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_hub.testing import FolderModel, LocalContext, check_plugin, run_plugin
from modelgrove_plugins.merge.params import MergeParams
from modelgrove_plugins.merge.sum import Sum

# Two float32 QRs and an SVD: tens of roundings of 6e-8.
EXACT = 5e-6


def merge(models, folder, **params):
    result = run_plugin(Sum(), models, folder, params)
    return result, FolderModel(folder / "out", adapter_type="lora")


def products(model):
    return {name: factors.up.double() @ factors.down.double() for name, factors in read_adapter(model).modules.items()}


def assert_close(found, wanted, room=EXACT):
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert float((found[name] - exact).norm() / exact.norm()) < room, name


def test_it_keeps_the_contract():
    assert [check for check in check_plugin(Sum) if not check.ok] == []


def test_the_sum_is_exact_for_any_ranks_namings_and_dtypes(make, tmp_path):
    parts = [
        make("a", 4),
        make("b", 7, kohya=True),
        make("c", 2, dtype=torch.float16),
        make("d", 3, dtype=torch.bfloat16),
    ]
    weights = [0.7, -0.5, 1.25, 2.0]
    result, merged = merge([model for model, _ in parts], tmp_path / "job", weights=weights)
    wanted = {
        name: sum(weight * updates[name] for weight, (_, updates) in zip(weights, parts, strict=True))
        for name in parts[0][1]
    }
    assert_close(products(merged), wanted)
    assert result.report["relative_error"] == 0.0
    assert {row["rank"] for row in result.report["modules"]} == {4 + 7 + 2 + 3}
    assert result.outputs[0].relation is Relation.MERGE
    assert result.outputs[0].kind is ModelKind.ADAPTER


def test_truncation_to_a_rank_or_an_energy_is_the_best_and_its_error_is_told(make, tmp_path):
    parts = [make(name, 6) for name in "abc"]
    result, merged = merge([model for model, _ in parts], tmp_path / "rank", rank=5)
    lost = total = 0.0
    for row in result.report["modules"]:
        values = torch.linalg.svdvals(sum(updates[row["module"]] for _, updates in parts)).square()
        lost, total = lost + float(values[5:].sum()), total + float(values.sum())
        # Three digits are reported.
        assert row["error"] == pytest.approx(math.sqrt(float(values[5:].sum() / values.sum())), rel=5e-3)
    assert result.report["relative_error"] == pytest.approx(math.sqrt(lost / total), rel=5e-3)
    assert {factors.rank for factors in read_adapter(merged).modules.values()} == {5}

    result, _ = merge([model for model, _ in parts], tmp_path / "energy", energy=0.9)
    assert 0 < result.report["relative_error"] <= math.sqrt(0.1)


def test_one_adapter_alone_is_rescaled_and_shrunk(make, tmp_path):
    model, updates = make("a", 8)
    result, merged = merge([model], tmp_path / "job", weights=[0.5], dtype="float16")
    # Both factors are rounded to float16 once: 2^-11 each, less on average.
    assert_close(products(merged), {name: 0.5 * update for name, update in updates.items()}, room=1e-3)
    assert result.report["pairs"] == []


def test_modules_that_only_one_adapter_has_are_kept(make, tmp_path):
    shapes = {"mid_block.attentions.0.proj_in": (32, 32)}
    (a, first), (b, second) = make("a"), make("b", shapes=shapes)
    result, merged = merge([a, b], tmp_path / "job")
    assert_close(products(merged), first | second)
    assert result.report["pairs"][0]["shared_modules"] == 0
    assert "no module in common" in " ".join(result.report["warnings"])
    assert [row["shared"] for row in result.report["coverage"]] == [0, 0]


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip


@pytest.fixture
def peft_model(tmp_path):
    """A UNet with two unrelated adapters, saved to a folder each."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "conv1"])
    model = get_peft_model(make_unet(), config, adapter_name="one")
    model.add_adapter("two", config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "peft")
    return model


def peft_deltas(model, adapter):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach().double().flatten(1)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_the_result_is_what_diffusers_and_peft_make_of_it(peft_model, tmp_path):
    models = [FolderModel(tmp_path / "peft" / name, adapter_type="lora") for name in ("one", "two")]
    merge(models, tmp_path / "job", weights=[0.7, 0.4])
    unet = make_unet()
    unet.load_lora_adapter(tmp_path / "job/out/pytorch_lora_weights.safetensors", prefix="unet")
    found = peft_deltas(unet, unet.active_adapters()[0])
    one, two = peft_deltas(peft_model, "one"), peft_deltas(peft_model, "two")
    assert_close(found, {name: 0.7 * one[name] + 0.4 * two[name] for name in one})


def test_it_equals_peft_s_cat_and_peft_s_linear_is_wrong_by_the_known_amount(peft_model, tmp_path):
    models = [FolderModel(tmp_path / "peft" / name, adapter_type="lora") for name in ("one", "two")]
    _, merged = merge(models, tmp_path / "job", weights=[1.0, 1.0])
    ours = products(merged)
    for kind in ("cat", "linear"):
        peft_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], kind, combination_type=kind)
    assert_close(peft_deltas(peft_model, "cat"), ours)
    # (B₁+B₂)(A₁+A₂) has two cross terms as large as the sum itself: √(N-1) = 1 for two unrelated adapters.
    linear = peft_deltas(peft_model, "linear")
    error = sum(float((linear[name] - ours[name]).square().sum()) for name in ours)
    assert math.sqrt(error / sum(float(exact.square().sum()) for exact in ours.values())) == pytest.approx(
        1.0, abs=0.15
    )


def test_the_file_says_how_it_was_made(make, tmp_path):
    models = [make(name)[0] for name in "ab"]
    _, merged = merge(models, tmp_path / "job", weights=[0.5, 2.0], rank=3)
    metadata = merged.metadata()
    recipe = recipe_of(metadata, "merged")
    # All parameters: a default may change, and the recipe still gives the same bytes.
    wanted = {"rank": 3, "blocks": [], "dtype": "float32", "naming": "diffusers"}
    assert (recipe.method, recipe.parameters) == ("sum", wanted)
    assert [(model.name, model.weight) for model in recipe.models] == [("a", 0.5), ("b", 2.0)]
    assert metadata["modelspec.merged_from"] == "a, b"
    fields = json.loads(metadata["lora_adapter_metadata"])
    assert (fields["unet.r"], fields["unet.lora_alpha"]) == (3, 3)


def test_the_report_measures_every_pair_as_dense_arithmetic_does(make, tmp_path):
    parts = [make("a", 4), make("b", 6)]
    result, _ = merge([model for model, _ in parts], tmp_path / "job")
    [pair] = result.report["pairs"]
    (_, a), (_, b) = parts
    echo = own = dot = overlap = 0.0
    for name in a:
        _, s, vt = torch.linalg.svd(a[name], full_matrices=False)
        inputs = vt[:4].T * s[:4]
        echo, own = echo + float((b[name] @ inputs).square().sum()), own + float((a[name] @ inputs).square().sum())
        dot += float((a[name] * b[name]).sum())
        other = torch.linalg.svd(b[name], full_matrices=False)[2][:6]
        overlap += float((vt[:4] @ other.T).square().sum()) / 4 / len(a)
    norms = [math.sqrt(sum(float(update.square().sum()) for update in updates.values())) for updates in (a, b)]
    # Four digits are reported.
    assert pair["crosstalk_of_b_on_a"] == pytest.approx(math.sqrt(echo / own), rel=1e-3)
    assert pair["cosine"] == pytest.approx(dot / norms[0] / norms[1], rel=1e-3)
    assert pair["input_overlap"] == pytest.approx(overlap, rel=1e-3)
    assert [row["norm"] for row in result.report["adapters"]] == pytest.approx(norms, rel=1e-3)
    assert [row["effective_rank"] for row in result.report["adapters"]] == [4.0, 6.0]


def test_a_model_merged_with_itself_is_doubled_and_its_crosstalk_is_one(make, tmp_path):
    model, updates = make("a", 4)
    result, merged = merge([model, model], tmp_path / "job")
    assert_close(products(merged), {name: 2 * update for name, update in updates.items()})
    [pair] = result.report["pairs"]
    assert (pair["a"], pair["b"]) == ("a (1)", "a (2)")
    assert pair["crosstalk_of_b_on_a"] == pair["cosine"] == pair["input_overlap"] == 1.0
    assert {row["rank"] for row in result.report["modules"]} == {4}


def test_adapters_of_different_families_are_refused(make, tmp_path):
    models = [make("a", family="sdxl")[0], make("b", family="flux")[0]]
    with pytest.raises(UsageError, match=r"different families.*a \(sdxl\).*b \(flux\)"):
        merge(models, tmp_path / "job")


def test_adapters_for_differently_shaped_bases_are_refused_by_module(make, tmp_path):
    module = "mid_block.attentions.0.proj_in"
    models = [make("a", shapes={module: (32, 32)})[0], make("b", shapes={module: (32, 64)})[0]]
    with pytest.raises(UsageError, match=rf"{module} is 32×32 in a but 32×64 in b"):
        merge(models, tmp_path / "job")


def test_a_convolution_of_one_pixel_is_the_linear_layer_that_others_write(make, tmp_path):
    module = "mid_block.attentions.0.proj_in"
    (a, first), (b, second) = make("a", shapes={module: (32, 32, 1, 1)}), make("b", shapes={module: (32, 32)})
    _, merged = merge([a, b], tmp_path / "job")
    assert_close(products(merged), {module: first[module] + second[module]})
    assert read_adapter(merged).modules[module].kernel == (1, 1)


def test_other_declared_bases_and_left_out_tensors_are_reported(make, tmp_path):
    module = "mid_block.attentions.0.proj_in"
    tensors = {f"unet.{module}.lora_A.weight": torch.randn(2, 8), f"unet.{module}.lora_B.weight": torch.randn(8, 2)}
    a = make.write("a", tensors | {f"unet.{module}.scale_b": torch.ones(8)}, {"ss_sd_model_name": "base-1"})
    b = make.write("b", tensors, {"ss_sd_model_name": "base-2"})
    result, _ = merge([a, b], tmp_path / "job")
    warnings = " / ".join(result.report["warnings"])
    assert "a: 1 tensors belong to no update" in warnings
    assert "base-1" in warnings
    assert result.report["coverage"][0]["unmatched_names"] == [f"unet.{module}.scale_b"]


def test_a_broken_factor_is_refused_by_name_and_leaves_no_file(make, tmp_path):
    module = "mid_block.attentions.0.proj_in"
    tensors = {
        f"unet.{module}.lora_A.weight": torch.full((2, 8), math.nan),
        f"unet.{module}.lora_B.weight": torch.ones(8, 2),
    }
    with pytest.raises(DataError, match=rf"unet\.{module}\.lora_A\.weight"):
        merge([make.write("a", tensors)], tmp_path / "job")
    assert not list((tmp_path / "job").rglob("*.safetensors"))


def test_a_kohya_name_that_cannot_be_written_is_refused_before_any_work(make, tmp_path):
    model, _ = make("a", kohya=True, shapes={"strange.module_of.mine": (8, 8)})
    with pytest.raises(UsageError, match="strange_module_of_mine"):
        merge([model], tmp_path / "job")


def test_a_kohya_name_is_restored_by_another_adapter_that_knows_it(make, tmp_path):
    shapes = {"strange.module_of.mine": (8, 8)}
    (a, first), (b, second) = make("a", kohya=True, shapes=shapes), make("b", shapes=shapes)
    _, merged = merge([a, b], tmp_path / "job")
    assert_close(
        products(merged), {"strange.module_of.mine": first["strange.module_of.mine"] + second["strange.module_of.mine"]}
    )


@pytest.mark.parametrize("params", [{"weights": [1.0]}, {"weights": [1.0, math.inf]}, {"rank": 0}, {"energy": 1.5}])
def test_parameters_that_do_not_fit_are_refused(params, make, tmp_path):
    with pytest.raises(UsageError):
        merge([make("a")[0], make("b")[0]], tmp_path / "job", **params)


def test_adapters_that_do_nothing_merge_to_nothing(make, tmp_path):
    module = "mid_block.attentions.0.proj_in"
    tensors = {f"unet.{module}.lora_A.weight": torch.randn(2, 8), f"unet.{module}.lora_B.weight": torch.zeros(8, 2)}
    models = [make.write(name, tensors) for name in "ab"]
    result, merged = merge(models, tmp_path / "job")
    assert float(products(merged)[module].norm()) == 0
    json.dumps(result.report, allow_nan=False)


def test_a_cancel_is_noticed_at_the_next_module(make, tmp_path):
    models = [make(name)[0] for name in "ab"]
    with pytest.raises(Cancelled), LocalContext(tmp_path / "job", models, cancel_after=2) as context:
        Sum().run(context, MergeParams())
    assert not list((tmp_path / "job").rglob("*.safetensors"))


def test_biases_and_norms_alone_are_merged_as_vectors(make, tmp_path):
    stem = "lora_unet_mid_block_resnets_0_norm1"
    models = [
        make.write(name, {f"{stem}.w_norm": torch.full((4,), 1.0), f"{stem}.b_norm": torch.ones(4)}) for name in "ab"
    ]
    result, merged = merge(models, tmp_path / "job", weights=[1.0, 0.5])
    found = {tensor.key: tensor.read() for tensor in merged.tensors()}
    assert {name: value.tolist() for name, value in found.items()} == {
        "unet.mid_block.resnets.0.norm1.diff": [1.5] * 4,
        "unet.mid_block.resnets.0.norm1.diff_b": [1.5] * 4,
    }
    json.dumps(result.report, allow_nan=False)


def test_a_layer_with_one_output_stays_a_lora(make, tmp_path):
    model, updates = make("a", 1, shapes={"mid_block.head": (1, 16)})
    _, merged = merge([model], tmp_path / "job")
    assert_close(products(merged), updates)
