"""Distances between features against their definitions, and the places where features are taken."""

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from scipy import linalg

from modelgrove_kernels.calls import Call
from modelgrove_plugins.compress.perception import features, frechet, middle_of, perceptual
from modelgrove_plugins.preview.diffusers import open_painter


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_frechet_distance_is_that_of_its_definition():
    one, other = draw(60, 1, 5) * torch.arange(1.0, 6), 0.5 * draw(60, 1, 5, seed=1) + 1
    a, b = (values.squeeze(1).double().numpy() for values in (one, other))
    covariances = [np.cov(values.T) for values in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet([one[:20], one[20:]], [other]) == pytest.approx(wanted / np.trace(covariances[0]), rel=1e-6)


def test_the_same_pictures_in_another_order_have_no_frechet_distance_but_a_perceptual_one():
    found = draw(40, 9, 6)
    assert frechet([found], [found.flip(0)]) == pytest.approx(0, abs=1e-9)
    assert perceptual([found], [found]) == 0
    assert perceptual([found], [found.flip(0)]) == pytest.approx(2, rel=0.1)  # directions without relation


def test_size_alone_is_no_perceptual_difference():
    found = draw(4, 9, 6)
    assert perceptual([found], [3 * found]) == pytest.approx(0, abs=1e-6)


def test_fewer_pictures_than_channels_are_compared_all_the_same():
    found = draw(4, 3, 50)
    assert frechet([found], [found]) == pytest.approx(0, abs=1e-6)
    assert frechet([found], [found + 1]) > 0.1


def test_a_unet_s_features_are_those_of_its_middle(pipeline, tmp_path):
    unet = open_painter(pipeline, tmp_path).networks["unet"]
    width = unet.config.cross_attention_dim
    call = Call(500.0, (draw(2, 6, 4, 4), torch.tensor(500)), {"encoder_hidden_states": draw(2, 3, width)}, draw(1))
    (found,) = features(unet, [call])
    assert found.shape == (2, 4, 32)
    assert not unet.mid_block._forward_hooks


def test_a_transformer_s_are_those_of_the_middle_block():
    transformer = PixArtTransformer2DModel(
        num_layers=5, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, in_channels=4, norm_num_groups=2,
    )  # fmt: skip
    assert middle_of(transformer) is transformer.transformer_blocks[2]
    assert middle_of(torch.nn.Linear(2, 2)).in_features == 2
