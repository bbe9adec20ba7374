"""What bench/lcsc.py compares: states that were saved, on drawings that no training saw."""

import pytest

from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_hub.formats.updates import read_updates
from modelgrove_plugins.evaluate.pictures import read_pictures


@pytest.fixture(scope="module")
def training(bench, tmp_path_factory):
    bench.BATCH = 2
    pictures = PictureSet.load(bench.ZOO)
    return bench.lora_training(tmp_path_factory.mktemp("lora"), pictures, apart=1, states=2), pictures


def test_drawings_that_are_scored_were_not_trained_on(training):
    made, pictures = training
    flags = {row for row, picture in enumerate(pictures.pictures) if picture.group == "flags"}
    unseen = {row for row, _ in made.unseen}
    assert unseen < flags
    assert abs(len(flags) - 2 * len(unseen)) <= 1
    first, second = ({tensor.name: tensor.read() for tensor in state.tensors()} for state in made.states)
    assert first.keys() == second.keys()
    assert any(not first[name].equal(second[name]) for name in first)


def test_a_state_alone_is_its_adapter_in_the_base(bench, training, tmp_path):
    made, _ = training
    whole = {tensor.name: tensor.read() for tensor in bench.combined(made, (0.0, 1.0), tmp_path / "alone").tensors()}
    before = {tensor.name: tensor.read() for tensor in made.base.tensors()}
    updates = dict(read_updates(made.states[1]))
    assert whole.keys() == before.keys()
    for name, change in updates.items():
        wanted = before[f"unet/{name}.weight"].double() + change.up.double() @ change.down.double()
        # The base is stored in float16: half of its spacing is 2^-11 of the value.
        assert bool(((whole[f"unet/{name}.weight"].double() - wanted).abs() <= 2**-10.9 * wanted.abs() + 1e-7).all())


def test_drawings_are_written_with_their_captions(bench, training, tmp_path):
    made, pictures = training
    found = read_pictures(bench.written(made.unseen[:2], pictures, tmp_path / "seen"))
    assert sorted(picture.name for picture in found) == sorted(f"{row}.png" for row, _ in made.unseen[:2])
    assert {picture.caption for picture in found} == {made.unseen[0][1]}
