import pytest
from PIL import Image

from modelgrove_plugins.preview.sheet import compose


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for number, (colour, size) in enumerate((("red", (100, 80)), ("blue", (60, 40)))):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", size, colour).save(paths[-1])
    return paths


def test_every_picture_stands_on_the_sheet_in_its_own_size(pictures):
    sheet = compose([("base", pictures[0]), ("with a LoRA", pictures[1])])

    colours = {colour: count for count, colour in sheet.getcolors(1 << 16)}
    assert colours[(255, 0, 0)] == 100 * 80
    assert colours[(0, 0, 255)] == 60 * 40


def test_long_titles_are_wrapped_and_make_room_above(pictures):
    short = compose([("base", pictures[0])])
    long = compose([("a title of quite a few words for a narrow picture", pictures[0])])

    assert long.width == short.width
    assert long.height > short.height + 18


def test_row_labels_stand_at_the_left(pictures):
    plain, labelled = compose([("base", pictures[0])]), compose([("base", pictures[0])], rows=["a dog", "a boat"])

    assert labelled.width == plain.width + 150
    assert labelled.crop((12, 0, 150, labelled.height)).getcolors(1 << 16) != [(138 * labelled.height, (255, 255, 255))]
