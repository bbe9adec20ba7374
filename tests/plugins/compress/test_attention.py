"""Cross-attention of real networks, with changed probabilities."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel

from modelgrove_hub.errors import UsageError
from modelgrove_kernels.probabilities import round_probabilities
from modelgrove_plugins.compress.attention import (
    change_probabilities,
    cross_attentions,
    round_attention,
    watched_peaks,
)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


@torch.no_grad()
def answer(network):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 4, 4, 4, generator=generator), 7, torch.randn(2, 5, 6, generator=generator)
    return network(*inputs).sample


def test_unets_and_transformers_have_some_and_unconditional_networks_none(unet):
    assert all(path.endswith("attn2") for path in cross_attentions(unet))
    assert len(cross_attentions(unet)) == 4
    transformer = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=4, in_channels=4, norm_num_groups=2,
    )  # fmt: skip
    assert list(cross_attentions(transformer)) == ["transformer_blocks.0.attn2", "transformer_blocks.1.attn2"]
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    assert not cross_attentions(UNet2DModel(sample_size=4, in_channels=4, out_channels=4, norm_num_groups=4, **blocks))


def test_unchanged_probabilities_change_nothing(unet):
    exact = answer(unet)
    for module in cross_attentions(unet).values():
        change_probabilities(module, lambda probabilities: probabilities)
    # The fused kernel sums in another order.
    assert torch.allclose(answer(unet), exact, atol=1e-5)


def test_rounded_attention_weighs_values_by_rounded_probabilities(unet):
    path, module = next(iter(cross_attentions(unet).items()))
    hidden, states = torch.randn(2, 3, 16), torch.randn(2, 5, 6)
    with torch.no_grad():
        parts = (module.to_q(hidden), module.to_k(states), module.to_v(states))
        query, key, value = (part.view(2, -1, module.heads, 16 // module.heads).transpose(1, 2) for part in parts)
        exact = torch.softmax(query @ key.mT * module.scale, -1)
        rounded = round_probabilities(exact.flatten(0, 1), 3, module.heads, start=True).view_as(exact)
        wanted = module.to_out[0]((rounded @ value).transpose(1, 2).flatten(2))
        round_attention(unet, path, bits=3, start=True)
        found = module(hidden, encoder_hidden_states=states)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(rounded, exact, atol=1e-2)


def test_what_is_no_cross_attention_is_refused(unet):
    with pytest.raises(UsageError, match="no cross-attention"):
        round_attention(unet, "mid_block.resnets.0", 4, start=False)


def test_peaks_are_mean_probabilities_of_each_token(unet):
    with watched_peaks(unet) as peaks:
        answer(unet)
    assert peaks.keys() == cross_attentions(unet).keys()
    for means in peaks.values():
        assert len(means) == 1
        assert means[0].shape == (5,)
        assert float(means[0].sum()) == pytest.approx(1, abs=1e-5)
    answer(unet)
    assert all(len(means) == 1 for means in peaks.values())
