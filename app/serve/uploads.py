"""Pictures that clients send: of known formats, and decoded no further than their header before that is checked."""

import asyncio
import io
import warnings

import numpy as np
import numpy.typing as npt
from fastapi import UploadFile
from PIL import Image, UnidentifiedImageError
from starlette.formparsers import MultiPartParser

from ...runtime.edit import fit
from .access import LARGEST_UPLOAD
from .faults import FaultError
from .worker import Facts

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 4096 * 4096
# Starlette writes larger parts to the disk; the body as a whole is bounded, and this server leaves no picture behind.
MultiPartParser.spool_max_size = LARGEST_UPLOAD


async def picture_of(upload: UploadFile, facts: Facts) -> npt.NDArray[np.uint8]:
    """An upload as pixels (H, W, 3) of the model's size.

    Raises:
        FaultError: it is no picture, or one with too many pixels.
    """
    content = await upload.read()
    return await asyncio.to_thread(decode, content, facts.width, facts.height)


def decode(content: bytes, width: int, height: int) -> npt.NDArray[np.uint8]:
    """A file as pixels (height, width, 3); see `picture_of`."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise FaultError(400, "too_many_pixels", f"an image has {MOST_PIXELS} pixels at the most", "image")
            return np.asarray(fit(image, width, height))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        known = ", ".join(FORMATS)
        text = f"image: this is no picture that is known here: send {known}"
        raise FaultError(400, "invalid_image", text, "image") from error
