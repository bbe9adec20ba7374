"""Sparse updates on common places, against dense arithmetic; thresholds against numpy's quantile."""

import numpy as np
import pytest
import torch

from modelgrove_kernels.sparse import gather, threshold_of


def entries(dense):
    places = dense.flatten().nonzero().flatten()
    return places, dense.flatten()[places]


def test_updates_lie_on_the_places_that_any_of_them_changes():
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(6, 7, generator=generator) * (torch.rand(6, 7, generator=generator) < 0.3) for _ in range(3)]
    support, rows = gather([entries(one) for one in dense], (6, 7))
    union = (dense[0] != 0) | (dense[1] != 0) | (dense[2] != 0)
    assert torch.equal(support.places, union.flatten().nonzero().flatten())
    for row, one in zip(rows, dense, strict=True):
        assert row.shape == (1, len(support.places))
        assert torch.equal(support.lift(row), one)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_threshold_leaves_out_at_most_the_share(share, dtype):
    generator = torch.Generator().manual_seed(1)
    weights = [(torch.randn(200, 50, generator=generator) * scale).to(dtype) for scale in (0.01, 0.05)]
    found = threshold_of(iter(weights), share)
    every = torch.cat([weight.float().abs().flatten() for weight in weights]).numpy()
    assert (every < found).mean() <= share
    # A number of seven bits of mantissa is at most 1/128 below the quantile.
    exact = np.quantile(every, share, method="higher")
    assert exact * (1 - 1 / 128) <= found <= exact


def test_weights_of_which_more_than_the_share_are_zero_have_a_threshold_above_zero():
    weights = torch.cat([torch.zeros(90), torch.linspace(0.1, 1, 10)])
    found = threshold_of([weights], 0.2)
    assert 0 < found <= 0.1
    assert (weights.abs() < found).sum() == 90
