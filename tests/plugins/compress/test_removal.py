"""Networks without some blocks are diffusers' own, with the same weights, and compute what is left."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from modelgrove_plugins.compress.removal import changes, config_of, position_of, stages_of, units_of, without


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pixart():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_layers=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, in_channels=4, norm_num_groups=2, use_additional_conditions=False,
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(16, 32), cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, transformer_layers_per_block=2,
    ).eval().requires_grad_(False)  # fmt: skip


def answer(network, seed=1):
    added = (
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        if hasattr(network, "caption_projection")
        else {}
    )
    with torch.inference_mode():
        return network(
            draw(2, 4, 8, 8, seed=seed),
            timestep=torch.tensor([500, 500]),
            encoder_hidden_states=draw(2, 3, 16),
            **added,
        ).sample


def test_a_transformer_s_blocks_are_units_at_their_depths(pixart):
    units = units_of(pixart)
    assert [unit.paths for unit in units] == [(f"transformer_blocks.{i}",) for i in range(4)]
    assert [unit.position for unit in units] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_transformer_without_blocks_computes_what_it_would_if_they_did_nothing(pixart):
    smaller = without(pixart, ("transformer_blocks.1", "transformer_blocks.3"))
    wanted = answer(pixart)
    handles = [
        pixart.transformer_blocks[i].register_forward_hook(lambda _m, inputs, _answer: inputs[0]) for i in (1, 3)
    ]
    skipped = answer(pixart)
    for handle in handles:
        handle.remove()
    assert len(smaller.transformer_blocks) == smaller.config.num_layers == 2
    torch.testing.assert_close(answer(smaller), skipped)
    assert not torch.allclose(skipped, wanted)


def test_without_shares_the_weights_and_leaves_the_network_as_it_is(pixart):
    smaller = without(pixart, ("transformer_blocks.0",))
    assert (
        smaller.transformer_blocks[0].ff.net[2].weight.data_ptr()
        == pixart.transformer_blocks[1].ff.net[2].weight.data_ptr()
    )
    assert len(pixart.transformer_blocks) == 4


def test_every_unit_of_a_unet_can_go_alone_and_the_saved_folder_loads(unet, tmp_path):
    units = units_of(unet)
    kinds = " ".join(unit.name for unit in units)
    assert "mid_block" in kinds
    assert "resnets" in kinds
    assert "transformer_blocks" in kinds
    for number, unit in enumerate(units):
        smaller = without(unet, unit.paths)
        wanted = answer(smaller)
        assert bool(torch.isfinite(wanted).all())
        assert sum(weight.numel() for weight in smaller.parameters()) < sum(
            weight.numel() for weight in unet.parameters()
        )
        smaller.save_pretrained(tmp_path / str(number))
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / str(number), low_cpu_mem_usage=False)
        torch.testing.assert_close(answer(loaded), wanted)


def test_the_changed_fields_are_all_that_a_configuration_needs(unet):
    for unit in units_of(unet):
        fields = changes(config_of(unet), list(unet.state_dict()), unit.paths)
        rebuilt = UNet2DConditionModel.from_config({**config_of(unet), **fields})
        assert set(rebuilt.state_dict()) == set(without(unet, unit.paths).state_dict())


def test_what_does_not_fit_is_refused_with_its_name(unet):
    with pytest.raises(ValueError, match="conv_in"):
        without(unet, ("conv_in",))


def test_sd3_keeps_its_last_block_and_its_dual_attentions_follow():
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, dual_attention_layers=(0, 2), qk_norm="rms_norm",
        in_channels=4, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    assert [unit.paths[0] for unit in units_of(network)] == ["transformer_blocks.0", "transformer_blocks.1"]
    smaller = without(network, ("transformer_blocks.1",))
    assert list(smaller.config.dual_attention_layers) == [0, 1]


def test_depth_is_that_of_the_stage(unet):
    stages = stages_of(unet)
    assert stages == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert position_of("mid_block.attentions.0.norm.weight", stages) == 0.5
    assert position_of("conv_out.weight", stages) is None
