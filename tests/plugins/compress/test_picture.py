"""Plots are read back from their pixels: a bar is as high as its number, a better curve lies lower."""

import pytest

from modelgrove_plugins.compress.picture import plot

BLUE, RED = (76, 120, 168), (228, 87, 86)


def layer(sqnr, layout="int8", name="unet/x.weight"):
    return {"name": name, "layout": layout, "sqnr_db": sqnr}


def rows_of(picture, colour, columns, top=28, bottom=216):
    """Rows of the frame that have pixels of this colour."""
    return {y for x in columns for y in range(top, bottom) if picture.getpixel((x, y)) == colour}


def middle(place, count):
    return int(64 + (place + 0.4) / count * (960 - 64 - 16))


def test_a_bar_is_as_high_as_the_layer_s_sqnr():
    picture = plot([layer(40.0), layer(20.0), layer(10.0)])
    heights = [len(rows_of(picture, BLUE, [middle(place, 3)])) for place in range(3)]
    # Whole pixels: one more or less.
    assert heights[1] == pytest.approx(heights[0] / 2, abs=1)
    assert heights[2] == pytest.approx(heights[0] / 4, abs=1)


def test_a_layer_without_loss_reaches_the_top_and_one_below_zero_has_no_bar():
    picture = plot([layer(None), layer(-3.0), layer(30.0)])
    lossless, hopeless, plain = (len(rows_of(picture, BLUE, [middle(place, 3)])) for place in range(3))
    assert lossless >= plain > hopeless
    assert hopeless <= 1  # the line it stands on


def test_the_worst_layers_are_named_below():
    one, six = plot([layer(10.0)]), plot([layer(10.0 + number) for number in range(6)])
    assert six.height - one.height == 4 * (one.height - plot([layer(None)]).height)


def test_a_thousand_layers_fit():
    assert plot([layer(20.0, name=f"l{number}") for number in range(1000)]).width == 960


def test_the_curve_with_less_error_lies_lower():
    layers = [layer(None)]
    bars = plot(layers).height
    curves = {"gptq": [(0, 1e-3), (900, 1e-3)], "rtn": [(900, 1e-1), (0, 1e-1)]}
    picture = plot(layers, curves)
    better = rows_of(picture, BLUE, [500], bars + 24, picture.height - 20)
    worse = rows_of(picture, RED, [500], bars + 24, picture.height - 20)
    assert better
    assert worse
    assert min(better) > max(worse)


def test_curves_without_any_error_are_not_drawn():
    assert plot([layer(20.0)], {"rtn": [(0, 0.0), (500, 0.0)]}).height == plot([layer(20.0)]).height
