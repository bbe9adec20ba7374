"""Sparse adapters: cut out of fine-tunes, put back, merged; against dense arithmetic."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import Factors
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.recognise import recognise
from modelgrove_hub.formats.sara import FILE
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.tables import Relation
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels.task_vectors import elected_mean, trim
from modelgrove_plugins.merge.dare import Dare
from modelgrove_plugins.merge.model_stock import ModelStock
from modelgrove_plugins.merge.sara import Sara
from modelgrove_plugins.merge.sum import Sum
from modelgrove_plugins.merge.ties import Ties
from modelgrove_plugins.merge.tsv import Tsv

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SHAPES = {f"{TO_Q}.weight": (16, 24), "conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,), "scale": (5,)}
THRESHOLD = 0.3


class Zoo:
    """A base, and fine-tunes of it whose changes are known."""

    def __init__(self, folder):
        self.folder, generator = folder, torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        self.base = self.write("base", self.weights)

    def write(self, name, weights):
        (self.folder / name).mkdir(parents=True)
        save_file(weights, self.folder / name / "diffusion_pytorch_model.safetensors")
        return FolderModel(self.folder / name, name=name)

    def change(self, seed, everywhere=False):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: 0.1 * torch.randn(w.shape, generator=generator) * (everywhere or (w.abs() < THRESHOLD))
            for name, w in self.weights.items()
            if name != "scale"
        }

    def tuned(self, seed, everywhere=False):
        change = self.change(seed, everywhere)
        return self.write(f"tuned-{seed}", {name: w + change.get(name, 0) for name, w in self.weights.items()})

    def sara(self, seed, everywhere=False, **params):
        job = self.folder / f"job-{seed}"
        result = run_plugin(
            Sara(), [self.tuned(seed, everywhere), self.base], job, {"base": True, "threshold": THRESHOLD, **params}
        )
        return FolderModel(job / "out" / FILE, name=f"sara-{seed}", adapter_type="sara"), result


@pytest.fixture
def zoo(tmp_path):
    return Zoo(tmp_path / "zoo")


def added(model):
    """By the base's name of a parameter, what an adapter adds, (out, in·kernel)."""
    return {
        name if name.endswith(".bias") else f"{name}.weight": (
            found.up @ found.down if isinstance(found := update.read(), Factors) else found
        )
        for name, update in open_updates(model).targets.items()
    }


def bake(models, base, job, plugin=Sum, **params):
    run_plugin(plugin(), [*models, base], job, {"base": True, **params})
    return load_file(next((job / "out").glob("*.safetensors")))


def join(models, job, plugin=Sum, **params):
    result = run_plugin(plugin(), models, job, params)
    [file] = (job / "out").glob("*.safetensors")
    return FolderModel(file, name="joined", adapter_type="sara"), result


def test_a_sara_fine_tune_is_cut_out_and_put_back(zoo, tmp_path):
    sara, result = zoo.sara(1)
    found = bake([sara], zoo.base, tmp_path / "bake")
    wanted = load_file(zoo.folder / "tuned-1/diffusion_pytorch_model.safetensors")
    for name, tensor in wanted.items():
        # (w + d) − w and its sum with w are rounded in float32, at numbers below 1.
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-7), name
    assert torch.equal(found["scale"], wanted["scale"])
    assert result.report["energy_kept"] == 1
    assert result.report["warnings"] == []
    assert result.outputs[0].relation is Relation.ADAPTER
    said = recognise(list_model(next(iter(sara.files().values()))))
    assert (said.kind, said.adapter_type, said.coverage) == ("adapter", "sara", 1)


def test_what_lies_in_larger_weights_is_dropped_and_told(zoo):
    sara, result = zoo.sara(2, everywhere=True)
    energy = inside = 0.0
    rows = {row["tensor"]: row for row in result.report["tensors"]}
    assert rows.keys() == zoo.change(2).keys()
    tuned = load_file(zoo.folder / "tuned-2/diffusion_pytorch_model.safetensors")
    for name, update in added(sara).items():
        weight = zoo.weights[name]
        change = (tuned[name].double() - weight.double()).view(update.shape)
        small = (weight.abs() < THRESHOLD).view(update.shape)
        # The difference is taken in float32.
        assert torch.allclose(update.double(), change * small, rtol=0, atol=2e-7)
        total, kept = float(change.square().sum()), float((change * small).square().sum())
        assert rows[name]["kept"] == pytest.approx(kept / total, rel=1e-3)
        assert rows[name]["dropped_norm"] == pytest.approx((total - kept) ** 0.5, rel=1e-3)
        energy, inside = energy + total, inside + kept
    assert result.report["energy_kept"] == pytest.approx(inside / energy, rel=1e-3)
    [warning] = result.report["warnings"]
    assert f"{1 - inside / energy:.1%} of what tuned-2 changed" in warning


def test_without_a_threshold_the_share_of_the_base_decides(zoo):
    _, result = zoo.sara(3, everywhere=True, threshold=None, share=0.1)
    small = (
        torch.cat([w.flatten().abs() for name, w in zoo.weights.items() if name != "scale"])
        < (result.report["threshold"])
    )
    assert result.report["changed"] == int(small.sum())
    assert 0.09 < int(small.sum()) / len(small) <= 0.1


def test_a_parameter_that_adapters_cannot_name_is_told_as_dropped(zoo):
    weights = zoo.weights | {"scale": zoo.weights["scale"] + 1, "conv_in.bias": zoo.weights["conv_in.bias"] + 0.001}
    models = [zoo.write("scaled", weights), zoo.base]
    result = run_plugin(Sara(), models, zoo.folder / "job", {"base": True, "threshold": 9})
    rows = {row["tensor"]: row for row in result.report["tensors"]}
    assert (rows["scale"]["kept"], rows["scale"]["changed"]) == (0, 0)
    assert rows["conv_in.bias"]["kept"] == 1


def test_a_base_in_half_precision_keeps_its_dtype(zoo, tmp_path):
    half = {name: w.half() for name, w in zoo.weights.items()}
    tuned = {name: (w + zoo.change(1).get(name, 0)).half() for name, w in half.items()}
    models = [zoo.write("half-tuned", tuned), zoo.write("half", half)]
    run_plugin(Sara(), models, tmp_path / "job", {"base": True, "threshold": THRESHOLD})
    stored = load_file(tmp_path / "job/out" / FILE)
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("values")} == {torch.float16}
    sara = FolderModel(tmp_path / "job/out" / FILE, name="half-sara", adapter_type="sara")
    found = bake([sara], models[1], tmp_path / "bake")
    for name, tensor in tuned.items():
        # The stored difference is off by half of its spacing, and so is the sum: each below 2^-11 of a number below 1.
        assert torch.allclose(found[name].float(), tensor.float(), rtol=0, atol=2**-10), name


def test_another_base_is_refused_with_names(zoo, tmp_path):
    sara, _ = zoo.sara(1)
    other = zoo.write("other", zoo.weights | {"conv_in.weight": zoo.weights["conv_in.weight"] + 1e-6})
    with pytest.raises(UsageError, match=r"sara-1 changes .* another base than other: 1 of 3 .* such as conv_in"):
        bake([sara], other, tmp_path / "bake")
    assert not list((tmp_path / "bake/out").rglob("*.safetensors"))


REFUSED = {
    "no base": (lambda zoo: [zoo.tuned(1)], {}, "--base the other"),
    "two fine-tunes": (lambda zoo: [zoo.tuned(1), zoo.tuned(2), zoo.base], {"base": True}, "--base the other"),
    "an adapter": (lambda zoo: [zoo.sara(1)[0], zoo.base], {"base": True}, "sara-1 is an adapter already"),
    "the base itself": (lambda zoo: [zoo.base, zoo.base], {"base": True}, "both are the same"),
    "no small change": (
        lambda zoo: [zoo.tuned(1), zoo.base], {"base": True, "threshold": 1e-9}, "in larger ones; raise --threshold"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("models", "params", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_inputs_that_make_no_sparse_adapter_are_refused(zoo, tmp_path, models, params, said):
    with pytest.raises(UsageError, match=said):
        run_plugin(Sara(), models(zoo), tmp_path / "job", params)
    assert not list((tmp_path / "job/out").rglob("*.safetensors"))


def test_values_that_are_not_finite_are_refused_by_tensor(zoo, tmp_path):
    broken = zoo.write("broken", zoo.weights | {"conv_in.bias": torch.full((8,), float("nan"))})
    with pytest.raises(DataError, match=r"conv_in\.bias holds NaN"):
        run_plugin(Sara(), [broken, zoo.base], tmp_path / "job", {"base": True})


def test_a_sum_of_two_is_sparse_and_exact(zoo, tmp_path):
    models = [zoo.sara(1)[0], zoo.sara(2)[0]]
    joined, result = join(models, tmp_path / "job", weights=[0.7, -0.4])
    first, second = map(added, models)
    for name, update in added(joined).items():
        # Two products and a sum in float32 of numbers below 1.
        assert torch.allclose(update, 0.7 * first[name] - 0.4 * second[name], rtol=0, atol=1e-7)
    assert list(joined.files()) == [FILE]
    sizes = [next(iter(model.files().values())).stat().st_size for model in (*models, joined)]
    assert sizes[2] < 1.2 * sizes[0] + 1000  # the recipe is in it
    [pair] = result.report["pairs"]
    assert pair["shared"] > 0.99  # the same base and threshold: the same places
    assert abs(pair["cosine"]) < 0.2


def test_a_model_merged_with_itself_is_numbered(zoo, tmp_path):
    model, _ = zoo.sara(1)
    [pair] = join([model, model], tmp_path / "job")[1].report["pairs"]
    assert (pair["a"], pair["b"]) == ("sara-1 (1)", "sara-1 (2)")


def test_shares_of_entries_are_those_of_the_changed_places(zoo, tmp_path):
    models = [zoo.sara(1)[0], zoo.sara(2)[0]]
    joined, _ = join(models, tmp_path / "job", Ties, density=0.5)
    first, second = map(added, models)
    for name, update in added(joined).items():
        places = (first[name] != 0) | (second[name] != 0)
        wanted = elected_mean([trim(one[name][places][None], 0.5) for one in (first, second)], [1.0, 1.0])
        assert torch.equal(update[places], wanted[0])
        assert not update[~places].any()


@pytest.mark.parametrize(("plugin", "params"), [(Sum, {}), (Ties, {}), (Dare, {"seed": 3}), (ModelStock, {})])
def test_what_is_baked_is_what_is_joined(zoo, tmp_path, plugin, params):
    models = [zoo.sara(1)[0], zoo.sara(2)[0]]
    joined, _ = join(models, tmp_path / "join", plugin, **params)
    wanted = bake([joined], zoo.base, tmp_path / "again")
    found = bake(models, zoo.base, tmp_path / "bake", plugin, **params)
    for name, tensor in wanted.items():
        # Sums in float32, in another order.
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name


def test_other_thresholds_and_parameters_are_united(zoo, tmp_path):
    wide, narrow = zoo.sara(1)[0], zoo.sara(2, threshold=0.1)[0]
    joined, result = join([wide, narrow], tmp_path / "job")
    first, second = added(wide), added(narrow)
    for name, update in added(joined).items():
        zero = torch.zeros_like(update)
        assert torch.allclose(update, first.get(name, zero) + second.get(name, zero), rtol=0, atol=1e-7)
    thresholds = {update.threshold for update in open_updates(joined).targets.values()}
    assert thresholds == {THRESHOLD}
    assert result.report["adapters"][1]["changed"] < result.report["adapters"][0]["changed"]


def test_adapters_of_different_bases_are_refused_by_module(zoo, tmp_path):
    other = Zoo(tmp_path / "other")
    other.weights = {name: w + 0.01 for name, w in other.weights.items()}
    other.base = other.write("moved", other.weights)
    with pytest.raises(UsageError, match="change single weights of different bases"):
        join([zoo.sara(1)[0], other.sara(2)[0]], tmp_path / "job")


@pytest.mark.parametrize(("plugin", "params"), [(Sum, {"rank": 16}), (Tsv, {})])
def test_a_rank_or_a_method_of_directions_makes_a_lora(zoo, tmp_path, plugin, params):
    models = [zoo.sara(1)[0], zoo.sara(2)[0]]
    joined, _ = join(models, tmp_path / "job", plugin, **params)
    said = recognise(list_model(next(iter(joined.files().values()))))
    assert said.adapter_type == "lora"
    if plugin is Sum:
        first, second = map(added, models)
        for name, update in added(joined).items():
            # Rank 16 is all of the smallest side; a decomposition in float32.
            assert torch.allclose(update, first[name] + second[name], rtol=0, atol=1e-6), name


def test_a_lora_and_a_sparse_adapter_are_added_as_matrices(zoo, make, tmp_path):
    sara, _ = zoo.sara(1)
    lora, exact = make("lora", shapes={TO_Q: (16, 24)})
    joined, _ = join([sara, lora], tmp_path / "job")
    wanted = added(sara)[f"{TO_Q}.weight"] + exact[TO_Q]
    # A decomposition in float32.
    assert torch.allclose(added(joined)[f"{TO_Q}.weight"].double(), wanted.double(), rtol=0, atol=1e-6)


def test_another_naming_has_no_names_for_single_weights(zoo, tmp_path):
    with pytest.raises(UsageError, match="--naming kohya has no names for single weights"):
        join([zoo.sara(1)[0], zoo.sara(2)[0]], tmp_path / "job", naming="kohya")


def test_adapters_that_cancel_each_other_leave_nothing(zoo, tmp_path):
    sara, _ = zoo.sara(1)
    with pytest.raises(UsageError, match="cancel each other"):
        join([sara, sara], tmp_path / "job", weights=[1, -1])
