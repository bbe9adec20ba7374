"""Codebooks against brute force, and assignments that learn what k-means cannot know."""

import math

import pytest
import torch
from torch import nn

from modelgrove_kernels.calls import Call
from modelgrove_kernels.codebook import Assignment, Codebook, kmeans, nearest_entries
from modelgrove_kernels.layouts import Layout, decode
from modelgrove_kernels.reconstruction import reconstruct


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(0)


def restored(book, parts=None):
    layout = Layout("lut", book.columns, book.bits, book.group, book.vector)
    return decode(layout, book.parts() if parts is None else parts)


def test_the_nearest_entries_are_those_of_all_distances():
    points, entries = draw(500, 4), draw(64, 4, seed=1)
    distances, indices = nearest_entries(points, entries, 2)
    every = torch.cdist(points, entries, compute_mode="donot_use_mm_for_euclid_dist").square()
    wanted = every.topk(2, dim=1, largest=False)
    assert torch.equal(indices, wanted.indices)
    torch.testing.assert_close(distances, wanted.values, rtol=1e-4, atol=1e-5)


def test_clusters_are_found():
    centres = draw(16, 2, seed=1) * 20
    points = centres.repeat_interleave(200, 0) + 0.01 * draw(3200, 2)
    found = kmeans(points, 32, generator())
    assert float(nearest_entries(centres, found, 1)[0].max()) < 0.01


def test_an_entry_is_the_mean_of_its_points():
    points = draw(2000, 2)
    entries = kmeans(points, 16, generator())
    nearest = nearest_entries(points, entries, 1)[1].flatten()
    means = torch.stack([points[nearest == entry].mean(0) for entry in range(16)])
    # Lloyd's algorithm is stopped before the last points have come to rest.
    torch.testing.assert_close(means, entries, rtol=0, atol=0.05)


def test_fewer_points_than_entries_are_kept_as_they_are():
    points = draw(5, 2)
    assert float(nearest_entries(points, kmeans(points, 64, generator()), 1)[0].max()) < 1e-9


@pytest.mark.parametrize(("bits", "vector", "columns"), [(8, 4, 64), (6, 2, 31), (8, 2, 9), (8, 4, 1)])
def test_codes_name_the_nearest_entries_of_scaled_rows(bits, vector, columns):
    weight = draw(40, columns) * torch.logspace(-2, 2, 40).unsqueeze(1)
    book = Codebook(weight, bits, vector, generator())
    shares = torch.nn.functional.pad(weight / book.scales.float(), (0, -columns % vector)).view(40, -1, vector)
    entries = book.parts()["table"][0].float()
    nearest = torch.cdist(shares, entries, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    wanted = (entries[nearest].view(40, -1) * book.scales.float())[:, :columns]
    # Where two entries are nearly as near, either may be named: float32 distances of shares about one.
    mine, theirs = (((found - weight) / book.scales.float()).norm(dim=1) for found in (restored(book), wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_vectors_lose_less_than_single_weights_at_the_same_bits():
    """What is said for vector quantization: 256 pairs are better than 16 by 16 values."""
    weight = draw(128, 256)
    pairs, single = (Codebook(weight, bits, vector, generator()) for bits, vector in ((8, 2), (4, 1)))
    assert float((restored(pairs) - weight).norm()) < float((restored(single) - weight).norm())


def test_learned_assignments_lose_less_than_k_means():
    """Inputs that are nearly of low rank: errors in some directions cost nothing, which k-means does not know."""
    layer = nn.Linear(32, 24, bias=False).requires_grad_(False)
    inputs = draw(256, 4) @ draw(4, 32, seed=1) + 0.05 * draw(256, 32, seed=2)
    call = Call(0.0, (inputs,), {}, layer(inputs))
    book = Codebook(layer.weight, 4, 2, generator())
    weight = Assignment(book, layer.weight.shape, (0, 1))
    reconstruct(layer, {"weight": weight}, [call], 300, generator())
    losses = [
        float((inputs @ restored(book, parts).T - call.output).square().sum())
        for parts in (book.parts(), book.parts(weight))
    ]
    assert losses[1] < losses[0] / 2


def test_an_assignment_begins_at_the_published_ratios_and_ends_at_a_decision():
    weight = draw(6, 8)
    book = Codebook(weight, 3, 2, generator())
    relaxed = Assignment(book, weight.shape, (0, 1))
    distances, candidates = nearest_entries(book.points, book.entries, 2)
    ratios = torch.softmax(-distances.clamp_min(1e-12).sqrt().log(), 1).unsqueeze(-1)
    wanted = (ratios * book.entries[candidates]).sum(1).view(6, 8) * book.scales.float()
    torch.testing.assert_close(relaxed(), wanted, rtol=1e-4, atol=1e-5)
    # At β = 2 the penalty is twice the published 2 p (1 - p).
    pair = ratios.squeeze(-1)
    torch.testing.assert_close(relaxed.penalty(2.0), 4 * pair.prod(1).mean(), rtol=1e-4, atol=1e-6)
    relaxed.choice.data = torch.where(torch.arange(len(candidates)) % 2 == 0, 9.0, -9.0)
    torch.testing.assert_close(relaxed(), restored(book, book.parts(relaxed)), rtol=2e-3, atol=2e-3)
    assert float(relaxed.penalty(2.0)) == 0


def test_what_is_frozen_stays_whatever_the_gradient():
    book = Codebook(draw(6, 8), 3, 2, generator())
    relaxed = Assignment(book, (6, 8), (0, 1))
    relaxed.choice.data.fill_(5.0)
    relaxed().square().sum().backward()
    assert bool((relaxed.choice.grad == 0).all())
    assert bool((relaxed.entries.grad != 0).any())


def test_a_convolution_s_weight_keeps_its_shape():
    weight = draw(6, 5, 3, 3)
    matrix = weight.permute(0, 2, 3, 1).reshape(6, -1)
    relaxed = Assignment(Codebook(matrix, 8, 2, generator()), weight.shape, (0, 2, 3, 1))
    relaxed.choice.data.fill_(9.0)
    # 138 pairs have entries of their own, all of them.
    torch.testing.assert_close(relaxed(), weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_weights_does_not_matter(scale):
    weight = draw(16, 32)
    plain, scaled = (Codebook(weight * factor, 6, 2, generator()) for factor in (1.0, scale))
    lost = [
        float((restored(book).double() / factor - weight).norm()) for book, factor in ((plain, 1.0), (scaled, scale))
    ]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


def test_rows_of_zeros_and_of_one_value_are_kept():
    weight = torch.stack([torch.zeros(12), torch.full((12,), -0.75), torch.full((12,), 3.0)])
    torch.testing.assert_close(restored(Codebook(weight, 6, 2, generator())), weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    weight = draw(4, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="NaN"):
        Codebook(weight, 6, 2, generator())
