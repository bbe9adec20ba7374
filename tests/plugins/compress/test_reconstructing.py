"""Blocks of real networks, and weights that are learned in them."""

from itertools import chain

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from modelgrove_hub.testing import LocalContext
from modelgrove_kernels.reconstruction import LearnedRounding
from modelgrove_plugins.compress import reconstructing
from modelgrove_plugins.compress.fidelity import Comparison, epsilon_error
from modelgrove_plugins.compress.reconstructing import LearnedParams, blocks_of, learned
from modelgrove_plugins.preview.diffusers import open_painter

PARAMS = LearnedParams(smallest=256, pictures=8, steps=4, iterations=150)
STEP = 0.05


def coarse(_name, weight):
    lower = (weight / STEP).floor() * STEP
    return LearnedRounding(weight, lower, lower + STEP)


def rounded(pipeline, folder, params, relax=coarse):
    context = LocalContext(folder, [pipeline])
    return {name: weight.decided() for name, weight in learned(context, pipeline, params, relax)}


def test_every_weight_is_in_one_block_the_innermost():
    transformer = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, in_channels=4, norm_num_groups=2,
    )  # fmt: skip
    weights = [name for name, _ in transformer.named_parameters() if name.endswith("weight")]
    blocks = blocks_of(transformer, weights)
    assert sorted(chain.from_iterable(blocks.values())) == sorted(weights)
    assert len(blocks["transformer_blocks.1"]) == 10
    assert blocks["proj_out"] == ["proj_out.weight"]
    paths = [name for name, _ in transformer.named_modules()]
    assert list(blocks) == sorted(blocks, key=paths.index)


def test_a_unet_s_blocks_are_its_resnets_and_transformers(pipeline, tmp_path):
    unet = open_painter(pipeline, tmp_path).networks["unet"]
    blocks = blocks_of(unet, [name for name, _ in unet.named_parameters() if name.endswith("weight")])
    assert "conv1.weight" in blocks["down_blocks.0.resnets.0"][1]
    assert any(path.endswith("transformer_blocks.0") for path in blocks)
    assert "mid_block" not in blocks


def test_learned_weights_lose_less_than_rounded_ones(pipeline, tmp_path):
    """The denoiser's own error on prompts and seeds that were not learned from."""
    painter = open_painter(pipeline, tmp_path / "original")
    comparison = Comparison(painter, "unet")
    errors = [
        epsilon_error(
            _with(painter, rounded(pipeline, tmp_path / f"{steps}", PARAMS.model_copy(update={"iterations": steps}))),
            comparison.calls,
        ).overall
        for steps in (0, 150)
    ]
    assert errors[1] < 0.8 * errors[0]


def _with(painter, weights):
    network = painter.networks["unet"]
    for name, weight in weights.items():
        network.get_parameter(name.removeprefix("unet/")).data = weight
    return network


def test_batches_of_blocks_change_nothing(pipeline, tmp_path, monkeypatch):
    params = PARAMS.model_copy(update={"iterations": 3})
    whole = rounded(pipeline, tmp_path / "whole", params)
    monkeypatch.setattr(reconstructing, "MOST", 1)
    single = rounded(pipeline, tmp_path / "single", params)
    assert list(whole) == list(single)
    assert all(torch.equal(whole[name], single[name]) for name in whole)


def test_what_is_not_relaxed_is_left_out(pipeline, tmp_path):
    chosen = rounded(
        pipeline, tmp_path, PARAMS.model_copy(update={"iterations": 1}),
        lambda name, weight: coarse(name, weight) if "conv1" in name else None,
    )  # fmt: skip
    assert chosen
    assert all("conv1" in name for name in chosen)


def test_a_cancel_is_heard_while_a_block_learns(pipeline, tmp_path):
    class Stopped(LocalContext):
        def progress(self, done, message=""):
            if message.startswith("learning"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(learned(Stopped(tmp_path / "job", [pipeline]), pipeline, PARAMS, coarse))
