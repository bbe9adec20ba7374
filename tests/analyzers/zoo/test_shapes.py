from collections import Counter

import numpy as np
import pytest

from modelgrove_analyzers.zoo.concepts import shape_concepts
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.shapes import COLOURS, PICTURES, SHAPES, draw_shapes, label, pairs


@pytest.fixture(scope="module")
def drawn() -> PictureSet:
    return draw_shapes()


def test_each_shape_and_each_colour_is_held_out_twice():
    held_out = [(colour, shape) for colour, shape, out in pairs() if out]
    assert len(held_out) == 20
    assert Counter(colour for colour, _ in held_out) == dict.fromkeys(COLOURS, 2)
    assert Counter(shape for _, shape in held_out) == dict.fromkeys(SHAPES, 2)
    assert [c.name for c in shape_concepts().values() if c.held_out] == [f"{c} {s}" for c, s in held_out]


def test_every_pair_has_its_own_pictures_apart_from_the_real_ones(drawn, pictures):
    both = pictures + drawn
    assert both.pixels.shape == (len(both.pictures), 32, 32, 3)
    for concept in shape_concepts().values():
        rows = concept.rows(both)
        assert len(rows) == PICTURES
        assert min(rows) >= len(pictures.pictures)
        assert len({both.pixels[row].tobytes() for row in rows}) == PICTURES


def test_pictures_show_their_colour_on_a_light_ground_and_nothing_is_cut_off(drawn):
    colours = {label(colour, shape): COLOURS[colour] for colour, shape, _ in pairs()}
    for picture, pixels in zip(drawn.pictures, drawn.pixels.astype(int), strict=True):
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        # A corner that touches the border may shade a pixel or two of it.
        assert np.median(edge, axis=0).min() >= 225
        near = np.abs(pixels - colours[picture.label]).max(-1) <= 15
        # A thin arrow at size 8 covers about 40 of 1,024 pixels without its blurred rim.
        assert near.sum() >= 15


def test_drawing_again_gives_the_same_pictures(drawn):
    assert (draw_shapes().pixels == drawn.pixels).all()
