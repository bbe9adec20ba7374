"""The part of real denoisers that sees nothing but the timestep."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

from modelgrove_kernels.temporal import watched_time

BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 4}
UNET = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, **BLOCKS}
TRANSFORMER = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "sample_size": 4,
    "norm_num_groups": 2,
}
PICTURES = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def unconditional():
    network = UNet2DModel(in_channels=4, out_channels=4, **UNET)
    return network, lambda t: network(PICTURES, t)


def classes():
    network = UNet2DModel(in_channels=4, out_channels=4, num_class_embeds=5, **UNET)
    return network, lambda t: network(PICTURES, t, class_labels=torch.tensor([1, 3]))


def pixart():
    network = PixArtTransformer2DModel(in_channels=4, cross_attention_dim=16, caption_channels=16, **TRANSFORMER)
    sizes = {"resolution": None, "aspect_ratio": None}
    named = {"encoder_hidden_states": PICTURES.new_ones(2, 3, 16), "added_cond_kwargs": sizes}
    return network, lambda t: network(PICTURES, timestep=torch.full((2,), t), **named)


def dit():
    network = DiTTransformer2DModel(in_channels=4, num_embeds_ada_norm=10, **TRANSFORMER)
    return network, lambda t: network(PICTURES, torch.full((2,), t), class_labels=torch.tensor([1, 3]))


def blocks_of(make, times=(900, 100)):
    torch.manual_seed(0)
    network, call = make()
    network.eval()
    with torch.no_grad(), watched_time(network) as watch:
        for time in times:
            call(time)
    return network, call, watch.blocks()


def answers_at(network, call, paths, time):
    """What those layers answer while the network is called, side by side."""
    heard = []
    hooks = [
        network.get_submodule(path).register_forward_hook(lambda _layer, _inputs, answer: heard.append(answer))
        for path in paths
    ]
    with torch.no_grad():
        call(time)
    for hook in hooks:
        hook.remove()
    return torch.cat(heard, -1)


@pytest.mark.parametrize(
    ("make", "blocks", "layers", "samples"),
    [(unconditional, 1, 8, 1), (classes, 1, 8, 2), (pixart, 1, 1, 1), (dit, 2, 1, 2)],
)
def test_a_block_answers_as_the_network_s_own_layers_at_a_timestep_that_was_not_watched(make, blocks, layers, samples):
    network, call, found = blocks_of(make)
    assert len(found) == blocks
    for block in found:
        outside = [path for inside, path in block.paths.items() if inside.startswith("layers.")]
        assert len(outside) == layers
        assert block.samples == samples
        exact = answers_at(network, call, outside, 321)
        with torch.no_grad():
            answers = [block(torch.tensor([sample]), torch.tensor([321])) for sample in range(samples)]
        # What was added is known in some order of its own.
        assert all(min(float((row - answer).abs().max()) for answer in answers) < 1e-4 for row in exact)


def test_inputs_of_layers_are_by_their_path():
    _, _, (block,) = blocks_of(unconditional)
    times = torch.arange(3)
    inputs = block.inputs(torch.zeros(3, dtype=torch.long), times)
    assert inputs.keys() == block.paths.keys()
    assert torch.equal(inputs["embedding.linear_1"], block.sinusoid(times))


def test_one_timestep_tells_nothing():
    assert blocks_of(unconditional, times=(900,))[2] == []
    assert blocks_of(unconditional, times=(900, 900))[2] == []


def test_time_that_is_scaled_on_the_way_is_left_alone():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = unconditional()[0]

        def forward(self, pictures, timestep):
            return self.inner(pictures, timestep * 1000)

    def make():
        network = Scaled()
        return network, lambda t: network(PICTURES, t / 1000)

    assert blocks_of(make)[2] == []


def test_a_layer_given_something_else_of_the_same_width_is_no_projection():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.other = unconditional()[0], nn.Linear(32, 2)

        def forward(self, pictures, timestep):
            self.other(torch.randn(2, 32))
            return self.unet(pictures, timestep)

    def make():
        network = Mixed()
        return network, lambda t: network(PICTURES, t)

    _, _, (block,) = blocks_of(make)
    assert "other" not in block.paths.values()


def test_conditions_by_text_do_not_hide_the_block():
    def make():
        network = UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=8, **UNET)
        return network, lambda t: network(PICTURES, t, torch.ones(2, 3, 8))

    assert len(blocks_of(make)[2][0].paths) == 10
