import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_kernels.ridge import align, centred, fit_ridge


def problem(seed, n=12, d=3):
    """A positive kernel matrix of n points in the plane, and targets."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return torch.exp(-torch.cdist(points, points).square()), torch.randn(n, d, generator=generator, dtype=torch.float64)


def brute_force(kernel, targets, regulariser, kept, asked):
    """Ridge with a free intercept from the bordered normal equations, fitted on `kept` only."""
    n = len(kept)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = kernel[kept][:, kept] + regulariser * torch.eye(n, dtype=torch.float64)
    system[:n, n] = system[n, :n] = 1
    border = torch.cat([targets[kept], torch.zeros(1, targets.shape[1], dtype=torch.float64)])
    solution = torch.linalg.solve(system, border)
    return kernel[asked][:, kept] @ solution[:n] + solution[n]


# The free intercept is a penalty of 1e-3 of the kernel's scale, which moves predictions by about as much.
CLOSE = {"rtol": 5e-3, "atol": 5e-3}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.01, 0.3, 3.0]))
def test_predictions_are_those_of_ridge_with_a_free_intercept(seed, regulariser):
    kernel, targets = problem(seed)
    train, asked = list(range(9)), [9, 10, 11]
    ridge = fit_ridge(kernel[train][:, train], targets[train], regulariser)
    expected = brute_force(kernel, targets, regulariser, train, asked)
    torch.testing.assert_close(ridge.predict(kernel[asked][:, train]), expected, **CLOSE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.01, 0.3, 3.0]), st.sampled_from([1, 3]))
def test_left_out_predictions_are_those_of_fitting_again(seed, regulariser, size):
    kernel, targets = problem(seed)
    groups = [i // size for i in range(12)]
    found = fit_ridge(kernel, targets, regulariser).left_out(groups)
    for group in set(groups):
        asked = [i for i in range(12) if groups[i] == group]
        kept = [i for i in range(12) if groups[i] != group]
        torch.testing.assert_close(found[asked], brute_force(kernel, targets, regulariser, kept, asked), **CLOSE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_aligned_weights_are_the_nearest_non_negative_combination(seed):
    kernels = torch.stack([problem(seed + i)[0] for i in range(5)])
    target = problem(seed)[1] @ problem(seed)[1].T + kernels[2]
    weights = align(kernels, target)
    off = ~torch.eye(12, dtype=torch.bool)
    rows = torch.stack([centred(kernel)[off] for kernel in kernels])
    wanted = centred(target)[off]
    assert bool((weights >= 0).all())
    if weights.sum() == 0:
        assert bool((rows @ wanted <= 0).all())
        return
    assert float(weights.sum()) == pytest.approx(1)
    # Karush–Kuhn–Tucker, at the best length: no slope where a weight is positive, none upwards where it is zero.
    mix = weights @ rows
    slope = rows @ (wanted - mix * (mix @ wanted) / (mix @ mix))
    # Coordinate descent stops at relative changes of 1e-6, of slopes that are of the order of ten.
    torch.testing.assert_close(slope[weights > 0], torch.zeros_like(slope[weights > 0]), rtol=0, atol=1e-3)
    assert float(slope.max()) <= 1e-3


def test_a_layer_that_says_nothing_gets_no_weight():
    kernel, targets = problem(0)
    weights = align(torch.stack([torch.zeros(12, 12), targets @ targets.T]), targets @ targets.T)
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_shapes_that_do_not_fit_are_refused():
    kernel, targets = problem(0)
    with pytest.raises(ValueError, match="12 targets"):
        fit_ridge(kernel[:11], targets, 1.0)
    with pytest.raises(ValueError, match="regulariser 0"):
        fit_ridge(kernel, targets, 0)
