import torch

from modelgrove_analyzers.zoo.letters import DIGITS, LETTERS, draw_letters, scanned_digits


def test_letters_are_drawn_in_8_by_8_and_are_the_same_again():
    one, two = draw_letters(200, seed=3), draw_letters(200, seed=3)
    assert one.pixels.shape == (200, 64)
    assert one.pixels.dtype == torch.float32
    assert (one.pixels == two.pixels).all()
    assert 0 <= one.pixels.min() < 0.1 < 0.9 < one.pixels.max() <= 1
    assert (one.pixels.max(1).values > 0.3).all()  # none has left the picture
    assert one.classes.max() < len(LETTERS)
    assert not (one.pixels == draw_letters(200, seed=4).pixels).all(1).any()


def test_pictures_of_one_letter_are_more_alike_than_those_of_two():
    letters = draw_letters(600, seed=0)
    means = torch.stack([letters.pixels[letters.classes == c].mean(0) for c in range(len(LETTERS))])
    nearest = torch.cdist(letters.pixels, means).argmin(1)
    # One of forty by chance.
    assert (nearest == letters.classes).float().mean() > 0.2


def test_digits_are_real_scans():
    digits = scanned_digits()
    assert digits.pixels.shape == (1797, 64)
    assert digits.pixels.max() == 1
    assert torch.bincount(digits.classes).min() > 170
    assert len(torch.bincount(digits.classes)) == len(DIGITS)
