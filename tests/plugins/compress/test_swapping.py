"""A network with packed layers computes what its unpacked weights compute."""

import pytest
import torch
from torch import nn

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.quantized import Activations
from modelgrove_plugins.compress.packed import describe, pack, unpack
from modelgrove_plugins.compress.swapping import quantized_copy


class Network(nn.Module):
    """A linear layer, a convolution, and a norm; called with a timestep as diffusers' networks are."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, sample, timestep):
        return self.last(self.norm(self.first(sample)).movedim(1, -1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().eval().requires_grad_(False)


def test_a_swapped_network_is_the_network_with_unpacked_weights(network):
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        name: pack(tensor, 4, 8) if tensor.ndim > 1 else tensor + 1 for name, tensor in network.state_dict().items()
    }
    found = quantized_copy(network, tensors)(inputs, 5)
    plain = Network().eval()
    plain.load_state_dict({n: t if isinstance(t, torch.Tensor) else unpack(t, n) for n, t in tensors.items()})
    torch.testing.assert_close(found, plain(inputs, 5).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, network(inputs, 5))


def test_the_timestep_decides_the_range(network):
    weight = network.last.weight
    packed = pack(weight, 8, None)
    ranges = torch.tensor([[[-10.0, 10.0]], [[0.0, 0.0]]])
    stored = describe(
        weight, {**packed.parts, "ranges": ranges}, layout="int8", bits=8, group=8,
        activations=Activations(bits=8, ranges="timestep", intervals=2),
    )  # fmt: skip
    copy = quantized_copy(network, {"last.weight": stored}, timesteps=(0, 500))
    inputs = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    early, late = copy(inputs, torch.tensor(499)), copy(inputs, timestep=torch.tensor([500]))
    assert float((early - network(inputs, 0)).abs().max()) < 0.2
    # A range of nothing lets nothing but the bias through.
    assert torch.equal(late, network.last.bias.expand_as(late))


@pytest.mark.parametrize("name", ["middle.weight", "first.other", "first"])
def test_a_tensor_of_another_network_is_refused(network, name):
    with pytest.raises(UsageError, match=name):
        quantized_copy(network, {name: torch.zeros(2)})


def test_a_tensor_of_another_shape_is_refused(network):
    with pytest.raises(UsageError, match=r"last\.bias"):
        quantized_copy(network, {"last.bias": torch.zeros(6)})
