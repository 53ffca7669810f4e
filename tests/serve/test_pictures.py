"""The PNG files that answers hold, as Pillow reads them."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from fewstep.app.serve.pictures import png


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (64, 64), (130, 257)])
def test_a_reader_sees_the_pixels(height: int, width: int) -> None:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    with Image.open(io.BytesIO(png(pixels, {}))) as picture:
        assert (picture.mode, picture.format) == ("RGB", "PNG")
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_a_reader_sees_the_metadata_in_any_script() -> None:
    told = {"prompt": "ракета 🚀\n火箭", "seed": "7", "negative_prompt": ""}
    with Image.open(io.BytesIO(png(np.zeros((2, 3, 3), np.uint8), told))) as picture:
        assert isinstance(picture, PngImagePlugin.PngImageFile)
        assert picture.text == told


def test_checksums_hold() -> None:
    content = png(np.zeros((4, 4, 3), np.uint8), {"prompt": "a rocket"})
    with Image.open(io.BytesIO(content)) as picture:
        picture.verify()
    torn = content.replace(b"a rocket", b"a basket")
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(torn))


def test_pixels_that_lie_elsewhere_than_in_rows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 6), np.uint8).transpose(1, 2, 0)
    with Image.open(io.BytesIO(png(pixels, {}))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_a_picture_is_as_small_as_pillow_makes_it() -> None:
    slope, random = np.linspace(0, 200, 128), np.random.default_rng(0)
    smooth = np.stack([np.add.outer(slope, slope) / 2, np.tile(slope, (128, 1)), np.tile(slope, (128, 1)).T], -1)
    pixels, file = (smooth + random.uniform(0, 8, smooth.shape)).astype(np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    assert len(png(pixels, {})) < 1.1 * len(file.getvalue())
