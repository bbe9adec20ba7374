"""Which layers are given joined tensors."""

import torch
from torch import nn

from modelgrove_kernels.concatenation import concatenated


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.shortcut, self.after = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 1)
        self.norm, self.plain = nn.GroupNorm(1, 5), nn.Conv2d(4, 4, 1)
        self.last, self.rows = nn.Linear(6, 2), nn.Linear(3, 2)

    def forward(self, hidden, skipped, tokens):
        both = torch.cat([hidden, skipped], dim=1)
        out = self.plain(self.shortcut(both) + self.after(self.norm(both)))
        return out, self.last(torch.concat((tokens, tokens, tokens[..., :0]), -1)), self.rows(torch.cat([tokens] * 2))


def test_layers_that_are_given_joined_channels_and_no_others():
    network, inputs = Joined(), (torch.randn(1, 3, 2, 2), torch.randn(1, 2, 2, 2), torch.randn(4, 3))
    with concatenated(network) as found:
        network(*inputs)
    # Rows side by side are no channels, and an empty part is none.
    assert found == {"shortcut": (3, 2), "last": (3, 3)}
    assert not any(module._forward_pre_hooks for module in network.modules())
