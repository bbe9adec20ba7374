"""Differences of full fine-tunes against plain ones in float64."""

import pytest
import torch
from safetensors.torch import save_file

from modelgrove_analyzers.encoders.deltas import find_reference, read_deltas, used_of
from modelgrove_hub.errors import DataError
from modelgrove_hub.testing import FolderModel

SHAPES = {"block.conv.weight": (6, 4, 3, 3), "block.linear.weight": (7, 5), "head.weight": (3, 7)}


def model(folder, seed, base=None, dtype=torch.float32, **changed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors |= {"block.linear.bias": torch.zeros(7), "steps": torch.zeros(2, 2, dtype=torch.int64)} | changed
    folder.mkdir()
    save_file({k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}, folder / "m.safetensors")
    return FolderModel(folder, base=base)


@pytest.fixture
def base(tmp_path):
    return model(tmp_path / "base", 0)


def weights(of, name):
    return next(tensor for tensor in of.tensors() if tensor.name == name).read().double().flatten(1)


def test_a_difference_is_standardised_and_given_both_ways(base, tmp_path):
    tuned = model(tmp_path / "tuned", 1, base)
    layers = read_deltas(tuned, find_reference([tuned], tmp_path), 64)
    assert set(layers) == {f"block_{n}{t}" for n in ("conv", "linear") for t in ("", ".T")} | {"head", "head.T"}
    for name, layer in (("block.conv.weight", "block_conv"), ("block.linear.weight", "block_linear")):
        X = weights(tuned, name) - weights(base, name)
        X /= X.square().mean().sqrt()
        found = layers[layer]
        # A singular value decomposition in float32 of a matrix of size one.
        torch.testing.assert_close((found.U * found.S) @ found.V.T, X.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layers[f"{layer}.T"].U * found.S, found.V * found.S)


def test_only_leading_directions_are_kept(base, tmp_path):
    tuned = model(tmp_path / "tuned", 1, base)
    layers = read_deltas(tuned, find_reference([tuned], tmp_path), 2)
    assert {layer.rank for layer in layers.values()} == {2}


def test_a_base_that_half_of_the_models_have_is_the_reference(base, tmp_path):
    models = [model(tmp_path / str(seed), seed, base if seed < 3 else None) for seed in range(1, 5)]
    reference = find_reference(models, tmp_path)
    torch.testing.assert_close(reference["block_linear"].double(), weights(base, "block.linear.weight"))


def test_else_their_mean_is(base, tmp_path):
    models = [model(tmp_path / str(seed), seed, base if seed < 2 else None) for seed in range(1, 5)]
    reference = find_reference(models, tmp_path)
    expected = torch.stack([weights(one, "block.conv.weight") for one in models]).mean(0)
    # Four numbers of size one are added in float32.
    torch.testing.assert_close(reference["block_conv"].double(), expected, atol=1e-6, rtol=1e-6)


def test_the_mean_leaves_out_what_is_not_finite(tmp_path):
    broken = torch.full((7, 5), float("nan"))
    models = [
        model(tmp_path / "a", 1),
        model(tmp_path / "b", 2),
        model(tmp_path / "c", 3, **{"block.linear.weight": broken}),
    ]
    reference = find_reference(models, tmp_path)
    expected = torch.stack([weights(one, "block.linear.weight") for one in models[:2]]).mean(0)
    torch.testing.assert_close(reference["block_linear"].double(), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(DataError, match="block_linear of c holds NaN"):
        read_deltas(models[2], reference, 4)


def test_layers_that_most_models_have_otherwise_are_left_out(base, tmp_path):
    models = [model(tmp_path / str(seed), seed, base, **{"head.weight": torch.ones(9, 7)}) for seed in range(1, 4)]
    assert set(find_reference(models, tmp_path)) == {"block_conv", "block_linear"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_in_half_precision_differs_by_rounding_alone(base, tmp_path, dtype):
    copy = model(tmp_path / "copy", 0, base, dtype)
    with pytest.raises(DataError, match="copy differs from what it is compared with by rounding at most"):
        read_deltas(copy, find_reference([copy], tmp_path), 4)


def test_only_the_layers_that_are_used_are_kept(base, tmp_path):
    reference = find_reference([model(tmp_path / "tuned", 1, base)], tmp_path)
    assert list(used_of(reference, ["block_conv", "head.T", "head"])) == ["block_conv", "head"]
    assert used_of(None, ["block_conv"]) is None
