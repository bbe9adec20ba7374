import pytest
from PIL import Image

from modelgrove_hub.errors import DataError
from modelgrove_plugins.preview.picture import arrange, enlarge, read_recipe, save


def test_a_saved_picture_gives_its_recipe_back(tmp_path):
    recipe = {"prompts": ["ein rotes Äpfelchen 🍎"], "steps": 8}

    save(Image.new("RGB", (4, 4)), tmp_path / "a.png", recipe)

    assert read_recipe(tmp_path / "a.png") == recipe


def test_a_picture_without_recipe_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")

    with pytest.raises(DataError, match="no modelgrove recipe"):
        read_recipe(tmp_path / "plain.png")


@pytest.mark.parametrize(("side", "scale", "expected"), [(32, 0, 128), (512, 0, 512), (32, 2, 64), (100, 0, 100)])
def test_small_pictures_are_enlarged(side, scale, expected):
    assert enlarge(Image.new("RGB", (side, side)), scale).size == (expected, expected)


def test_rows_and_columns_stand_where_they_belong():
    colours = [["red", "green"], ["blue", "black"]]

    sheet = arrange([[Image.new("RGB", (8, 8), colour) for colour in row] for row in colours])

    assert sheet.size == (20, 20)
    assert [sheet.getpixel(place) for place in ((4, 4), (16, 4), (4, 16), (10, 10))] == [
        (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255),
    ]  # fmt: skip
