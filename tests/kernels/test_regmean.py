"""RegMean against least squares on the inputs themselves, in float64."""

import pytest
import torch

from modelgrove_kernels.regmean import regress


def inputs(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing


UPDATES = [torch.randn(7, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
WEIGHTS = [1.0, 0.5, 2.0]
XS = [inputs(200, 10, seed) for seed in range(3)]
MOMENTS = [(X.T @ X / len(X)).float() for X in XS]


def total(found, weights=WEIGHTS):
    return sum(weight * update.double() for weight, update in zip(weights, found, strict=True))


def test_it_is_least_squares_on_all_inputs_together():
    answers = [w * X @ update.double().T for w, X, update in zip(WEIGHTS, XS, UPDATES, strict=True)]
    wanted = torch.linalg.lstsq(torch.cat(XS), torch.cat(answers)).solution.T
    found = total(regress(UPDATES, MOMENTS, 1.0))
    # The ridge is 1e-6 of the mean moment; the moments' smallest eigenvalue is some hundredths of it.
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_moments_are_shrunk_off_the_diagonal():
    moments = [0.9 * G.double() + 0.1 * torch.diag(G.double().diagonal()) for G in MOMENTS]
    wanted = sum(w * R.double() @ G for w, R, G in zip(WEIGHTS, UPDATES, moments, strict=True)) @ sum(moments).inverse()
    assert float((total(regress(UPDATES, MOMENTS, 0.9)) - wanted).norm() / wanted.norm()) < 1e-4


def test_one_update_and_copies_of_it_stay():
    [alone] = regress(UPDATES[:1], MOMENTS[:1], 0.9)
    assert torch.allclose(alone, UPDATES[0], atol=1e-4)
    twins = regress([UPDATES[0]] * 2, MOMENTS[:2], 0.9)
    assert torch.allclose(twins[0] + twins[1], UPDATES[0], atol=1e-4)


def test_inputs_that_do_not_meet_leave_every_update_to_its_own():
    moments = [torch.diag(torch.tensor([1.0, 2, 0, 0])), torch.diag(torch.tensor([0.0, 0, 3, 0]))]
    found = regress([torch.ones(2, 4), 4 * torch.ones(2, 4)], moments, 1.0)
    # The last column is an input of neither: the mean.
    assert torch.allclose(found[0] + found[1], torch.tensor([[1.0, 1, 4, 2.5]] * 2), atol=1e-4)


def test_factors_may_stand_for_updates():
    up = torch.randn(12, 7, generator=torch.Generator().manual_seed(9))
    whole = regress([up @ update for update in UPDATES], MOMENTS, 0.9)
    for found, down in zip(whole, regress(UPDATES, MOMENTS, 0.9), strict=True):
        assert torch.allclose(found, up @ down, atol=1e-4)


@pytest.mark.parametrize("moment", [torch.zeros(10, 10), torch.full((10, 10), float("nan")), -torch.eye(10)])
def test_moments_that_are_none_are_refused(moment):
    with pytest.raises(ValueError, match="moments"):
        regress(UPDATES[:2], [moment, moment], 1.0)
