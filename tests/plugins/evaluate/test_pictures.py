"""Pictures with captions, read from a folder."""

from PIL import Image

from modelgrove_plugins.evaluate.pictures import read_pictures


def test_a_photo_is_read_the_way_up_that_its_camera_wrote(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    photo = Image.new("RGB", (20, 10), "red")
    photo.paste("blue", (0, 0, 10, 10))
    photo.save(tmp_path / "a.png", exif=exif)
    [read] = read_pictures(tmp_path, captioned=False)
    assert read.image.size == (10, 20)
    assert (read.image.getpixel((5, 2)), read.image.getpixel((5, 17))) == ((0, 0, 255), (255, 0, 0))
