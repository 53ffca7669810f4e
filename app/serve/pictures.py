"""Pixels as PNG, with what made them in its metadata."""

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FAST = 1
"""Of zlib's levels: a little larger, several times quicker."""


def png(pixels: npt.NDArray[np.uint8], metadata: Mapping[str, str]) -> bytes:
    """A PNG of (H, W, 3) uint8, with a text chunk for every entry."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=FAST, pnginfo=info)
    return file.getvalue()
