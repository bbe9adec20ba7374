"""What bench/concepts.py counts: an adapter keeps all of itself, the base nothing."""

import pytest
import torch

from modelgrove_analyzers.zoo.base_folder import open_base
from modelgrove_analyzers.zoo.pictures import PictureSet


@pytest.fixture(scope="module")
def world(bench, tmp_path_factory):
    """The network, one subject trained for a moment, and the gallery of two concepts."""
    folder = tmp_path_factory.mktemp("concepts")
    bench.STEPS = 6
    base, pictures = open_base(bench.ZOO / "zoo-base"), PictureSet.load(bench.ZOO)
    network = bench.Network(base)
    [subject] = bench.subjects(bench.trained(folder, "distinct", ["cat"], base, pictures), network, pictures)
    return network, subject, bench.gallery_of(["cat", "chicken"], network, pictures)


def test_alone_is_one_and_nothing_is_zero(bench, world):
    network, subject, gallery = world
    found = bench.judge(subject.model, [subject], network, gallery)
    assert found["kept"] == pytest.approx(1)
    assert found["fit"] == pytest.approx(1)
    assert bench.squared(subject.alone - subject.base) > 0
    assert found["drift"] > 0


def test_the_weights_are_put_back(bench, world):
    network, subject, _ = world
    before = {name: weight.clone() for name, weight in network.base.unet.state_dict().items()}
    with network.wearing(subject.model):
        assert any(not torch.equal(weight, before[name]) for name, weight in network.base.unet.state_dict().items())
    assert all(torch.equal(weight, before[name]) for name, weight in network.base.unet.state_dict().items())


def test_a_drawing_is_recognised_as_its_own_concept(bench, world):
    network, _, (drawings, names) = world
    for name in ("cat", "chicken"):
        own = drawings[[place for place, label in enumerate(names) if label == name]]
        assert bench.recognised(own, name, (drawings, names)) == 1
