"""Checkpoints merged tensor by tensor, against float64 arithmetic."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.tables import Relation
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.merge.orthogonal import Orthogonal
from modelgrove_plugins.merge.sum import Sum

FILE = "diffusion_pytorch_model.safetensors"
SHAPES = {"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,), "proj.weight": (8, 8), "norm.weight": (8,)}


def values(model):
    return {key: tensor.double() for key, tensor in load_file(model.files()[FILE]).items()}


def merge(models, folder, plugin=Sum, **params):
    result = run_plugin(plugin(), models, folder, params)
    return result, load_file(folder / "out" / FILE)


def test_with_a_base_differences_are_summed(checkpoint, tmp_path):
    base, a, b = (checkpoint(name, seed) for seed, name in enumerate(("base", "a", "b")))
    result, found = merge([a, b, base], tmp_path / "job", weights=[0.7, -0.4], base=True)
    origin, one, two = values(base), values(a), values(b)
    for key in SHAPES:
        wanted = origin[key] + 0.7 * (one[key] - origin[key]) - 0.4 * (two[key] - origin[key])
        # One rounding to float32 and a few operations.
        assert torch.allclose(found[key].double(), wanted, rtol=0, atol=2e-6)
    assert torch.equal(found["position_ids"], torch.arange(4))
    assert result.report["merged_tensors"] == len(SHAPES)
    assert result.outputs[0].relation is Relation.MERGE
    assert set(result.outputs[0].files) == {FILE, "config.json"}


def test_without_a_base_weights_are_averaged(checkpoint, tmp_path):
    a, b = checkpoint("a", 1), checkpoint("b", 2)
    _, found = merge([a, b], tmp_path / "job", weights=[3.0, 1.0])
    one, two = values(a), values(b)
    for key in SHAPES:
        assert torch.allclose(found[key].double(), 0.75 * one[key] + 0.25 * two[key], rtol=0, atol=1e-6)


def test_halves_are_added_in_float32_and_rounded_once(checkpoint, tmp_path):
    base, *models = (checkpoint(f"m{seed}", seed, torch.bfloat16) for seed in range(9))
    _, found = merge([*models, base], tmp_path / "job", weights=[0.1] * 8, base=True)
    origin = values(base)
    for key in SHAPES:
        wanted = origin[key] + sum(0.1 * (values(model)[key] - origin[key]) for model in models)
        # Half of bfloat16's spacing is 2^-9 of the value; float32 noise may tip a tie.
        assert bool(((found[key].double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all())


def test_a_block_s_strength_is_its_own(checkpoint, tmp_path):
    base, a = checkpoint("base", 0), checkpoint("a", 1)
    _, found = merge([a, base], tmp_path / "job", base=True, blocks=["conv_in=0"])
    assert torch.equal(found["conv_in.weight"].double(), values(base)["conv_in.weight"])
    assert torch.allclose(found["proj.weight"].double(), values(a)["proj.weight"], atol=1e-6)


def test_a_block_of_a_denoiser_is_named_without_its_folder(tmp_path):
    models = []
    for number, name in enumerate(("base", "a")):
        (tmp_path / name / "unet").mkdir(parents=True)
        save_file({"conv_in.weight": torch.full((2, 2), float(number))}, tmp_path / name / "unet" / FILE)
        models.append(FolderModel(tmp_path / name, name=name))
    run_plugin(Sum(), models[::-1], tmp_path / "job", {"base": True, "blocks": ["conv_in=0.5"]})
    found = load_file(tmp_path / "job/out/unet" / FILE)
    assert found["conv_in.weight"].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_method_of_differences_wants_the_base(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="--base"):
        merge([checkpoint("a", 1), checkpoint("b", 2)], tmp_path / "job", Orthogonal)


@pytest.mark.parametrize(
    ("more", "match"),
    [({"extra.weight": torch.ones(2)}, "extra.weight"), ({"proj.weight": torch.ones(8, 4)}, r"\(8, 4\) in b")],
)
def test_other_tensors_or_shapes_are_refused_by_name(more, match, checkpoint, tmp_path):
    with pytest.raises(UsageError, match=match):
        merge([checkpoint("a", 1), checkpoint("b", 2, **more)], tmp_path / "job")
    assert not list((tmp_path / "job/out").rglob("*.safetensors"))


def test_a_nan_is_refused_by_name_and_leaves_nothing(checkpoint, tmp_path):
    broken = checkpoint("b", 2, **{"proj.weight": torch.full((8, 8), torch.nan)})
    with pytest.raises(DataError, match=r"proj\.weight"):
        merge([checkpoint("a", 1), broken], tmp_path / "job")
    assert not list((tmp_path / "job/out").rglob("*.safetensors"))


def test_an_adapter_among_checkpoints_is_refused_with_the_way_out(checkpoint, make, tmp_path):
    with pytest.raises(UsageError, match="--base a"):
        merge([checkpoint("a", 1), make("lora")[0]], tmp_path / "job")


@pytest.mark.parametrize("params", [{"rank": 4}, {"energy": 0.9}])
def test_checkpoints_have_no_rank(params, checkpoint, tmp_path):
    with pytest.raises(UsageError, match="shapes"):
        merge([checkpoint("a", 1), checkpoint("b", 2)], tmp_path / "job", **params)
