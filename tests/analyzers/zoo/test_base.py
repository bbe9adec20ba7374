"""The base's training: what it sees, that it learns, and that it goes on where it was stopped."""

import numpy as np
import pytest
import torch

from modelgrove_analyzers.zoo import base
from modelgrove_analyzers.zoo.base import HELD_OUT_GROUPS, BaseRecipe, BaseTrainer, captions, is_base_picture, to_pixels
from modelgrove_analyzers.zoo.base_folder import read_checkpoint
from modelgrove_analyzers.zoo.pictures import PictureSet

RECIPE = BaseRecipe(steps=6, batch=4, channels=4, warmup=1, checkpoint_every=3)


@pytest.fixture(scope="module")
def few(pictures):
    """Forty pictures of all groups."""
    rows = range(0, len(pictures.pictures), len(pictures.pictures) // 40)
    return PictureSet(tuple(pictures.pictures[row] for row in rows), pictures.pixels[list(rows)])


@pytest.fixture
def small_unet(monkeypatch):
    """The architecture with 16 and 32 channels."""
    monkeypatch.setitem(base.UNET, "block_out_channels", (16, 32))
    monkeypatch.setitem(base.UNET, "norm_num_groups", 8)
    monkeypatch.setitem(base.UNET, "attention_head_dim", 2)


def weights(trainer):
    return torch.cat([value.flatten() for value in trainer.average.values()])


def test_held_out_pictures_are_never_seen(pictures):
    seen = [p for i, p in enumerate(pictures.pictures) if is_base_picture(i, p)]
    assert not {p.group for p in seen} & set(HELD_OUT_GROUPS)
    usual = [p for p in pictures.pictures if p.group not in HELD_OUT_GROUPS]
    assert 0.95 < len(seen) / len(usual) < 0.98  # every thirtieth is left out


def test_captions_name_the_picture(pictures):
    picture = pictures.pictures[0]
    assert all(picture.label in caption for caption in captions(picture))
    assert captions(picture)[0].startswith(picture.artist)


def test_pixels_span_minus_one_to_one():
    values = np.array([0, 255], np.uint8).repeat(3).reshape(2, 1, 1, 3)
    pixels = to_pixels(values)
    assert pixels.shape == (2, 3, 1, 1)
    assert pixels.flatten().tolist() == [-1] * 3 + [1] * 3


@pytest.mark.usefixtures("small_unet")
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(few, tmp_path):
    whole = BaseTrainer(few, tmp_path / "whole", RECIPE)
    told = []
    whole.run(lambda done, message: told.append((done, message)))
    assert [done for done, _ in told] == pytest.approx([step / 6 for step in range(1, 7)])
    assert told[-1][1].startswith("step 6, loss ")

    first = BaseTrainer(few, tmp_path / "parts", RECIPE)
    with pytest.raises(KeyboardInterrupt):
        first.run(stop_after(4))
    second = BaseTrainer(few, tmp_path / "parts", RECIPE)
    assert second.step == 3  # its last checkpoint
    second.run()
    torch.testing.assert_close(weights(second), weights(whole))


@pytest.mark.usefixtures("small_unet")
def test_the_checkpoint_is_the_averaged_base(few, tmp_path):
    trainer = BaseTrainer(few, tmp_path, RECIPE)
    trainer.run()
    read, recipe = read_checkpoint(tmp_path / "checkpoint.pt")
    assert recipe["step"] == recipe["steps"] == RECIPE.steps
    for name, value in read.unet.named_parameters():
        torch.testing.assert_close(value, trainer.average[name], rtol=0, atol=0)


@pytest.mark.usefixtures("small_unet")
def test_training_lowers_the_error(few, tmp_path):
    trainer = BaseTrainer(few, tmp_path, BaseRecipe(steps=150, batch=8, channels=4, warmup=5, checkpoint_every=150))
    losses = []
    trainer.run(lambda _done, message: losses.append(float(message.rpartition(" ")[2])))
    assert losses[-1] < 0.9 * losses[0]  # the running mean starts at the first step's error


def stop_after(steps):
    def tell(done, _message):
        if done >= steps / RECIPE.steps:
            raise KeyboardInterrupt

    return tell
