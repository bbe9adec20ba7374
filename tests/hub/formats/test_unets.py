import pytest
import torch
from diffusers import UNet2DConditionModel

from modelgrove_hub.errors import CorruptFileError, DataError
from modelgrove_hub.formats.unets import build_unet

CONFIG = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(CONFIG).eval()


def test_the_network_computes_what_diffusers_computes(network):
    built = build_unet(network.config, {name: tensor.half() for name, tensor in network.state_dict().items()})
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected, found = (one(latents, 10, states).sample for one in (network, built))
    assert found.dtype == torch.float32
    # The weights were rounded to eleven bits on the way.
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_a_missing_tensor_is_named(network):
    tensors = dict(network.state_dict())
    del tensors["conv_in.weight"]
    with pytest.raises(CorruptFileError, match=r"conv_in\.weight"):
        build_unet(CONFIG, tensors)


def test_a_tensor_too_many_is_refused(network):
    with pytest.raises(CorruptFileError, match="tensors for a network of"):
        build_unet(CONFIG, {**network.state_dict(), "extra": torch.zeros(1)})


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 1000}, {"layers_per_block": [1, 99]}, {"layers_per_block": "many"},
        {"layers_per_block": 0}, {"down_block_types": ["DownBlock2D"] * 9}, {"block_out_channels": "wide"},
        {"down_block_types": ["NoSuchBlock"] * 2},
    ],
)  # fmt: skip
def test_a_configuration_that_is_too_large_or_wrong_is_refused(network, change):
    with pytest.raises(DataError, match=r"unet/config\.json"):
        build_unet({**CONFIG, **change}, network.state_dict())
