"""Recorded calls, and batches drawn from them."""

import torch
from torch import nn

from modelgrove_kernels.calls import Call, picked, recorded, tensors_in, timestep_of, told


class Network(nn.Module):
    """x + t, as diffusers answers: in a tuple."""

    def forward(self, sample, timestep, extra=None):
        return (sample + torch.as_tensor(timestep).float().view(-1)[0],)


def test_calls_are_kept_as_they_were_answered():
    network, x = Network(), torch.zeros(2, 3)
    with recorded(network) as calls:
        network(x, 7)
        network(x, timestep=torch.tensor([9.0, 9.0]))
    network(x, 1)
    assert [call.timestep for call in calls] == [7, 9]
    assert [float(call.output.mean()) for call in calls] == [7, 9]


def test_the_timestep_is_told_before_the_call_and_no_longer_than_wanted():
    network, heard = Network(), []
    with told(network, heard.append):
        network(torch.zeros(1), 5)
    network(torch.zeros(1), 6)
    assert heard == [5]
    assert timestep_of((torch.zeros(1),), {}) == 0


def test_a_batch_has_the_same_samples_everywhere():
    rows = torch.arange(6.0)
    call = Call(3.0, (rows, torch.tensor(3.0)), {"nested": {"a": [rows * 2]}, "flag": True}, rows * 10)
    batch = picked([call], 4, torch.Generator().manual_seed(0))
    sample, time = batch.positional
    assert len(sample.unique()) == 4
    assert torch.equal(batch.output, sample * 10)
    assert torch.equal(batch.named["nested"]["a"][0], sample * 2)
    assert batch.named["flag"] is True
    assert time == 3.0
    assert len(list(tensors_in((batch.positional, batch.named)))) == 3


def test_all_calls_are_drawn():
    calls = [Call(float(t), (), {}, torch.full((1,), float(t))) for t in range(3)]
    generator = torch.Generator().manual_seed(0)
    assert {float(picked(calls, 1, generator).output) for _ in range(40)} == {0, 1, 2}
