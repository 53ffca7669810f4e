"""A sheet of pictures: what the captions look like in the data, and what the generator made of them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ...runtime.files import atomic_path

TILE, GAP, LINE, COLUMNS = 128, 8, 13, 6
CAPTION_LINES, CAPTION_WIDTH = 3, 24


def save_sheet(
    real: npt.NDArray[np.uint8], generated: npt.NDArray[np.uint8], captions: Sequence[str], path: Path
) -> None:
    """Write a PNG of pairs, real above generated, six a row, each over its caption.

    Args:
        real: (N, H, W, 3) uint8.
        generated: (N, H, W, 3) uint8.
        captions: N of them.
        path: the file.
    """
    width, height = TILE + GAP, 2 * TILE + CAPTION_LINES * LINE + GAP
    rows = -(-len(captions) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * width + GAP, rows * height + LINE + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=10)
    draw.text((GAP, 2), "above: real, below: generated", fill="black", font=font)
    for position, (above, below, caption) in enumerate(zip(real, generated, captions, strict=True)):
        x, y = GAP + position % COLUMNS * width, LINE + GAP + position // COLUMNS * height
        for row, pixels in enumerate((above, below)):
            # BOX repeats pixels when it enlarges, so that nothing is smoothed over.
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BOX)
            canvas.paste(tile, (x, y + row * TILE))
        lines = textwrap.wrap(caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder="…")
        draw.multiline_text((x, y + 2 * TILE), "\n".join(lines), fill="black", font=font, spacing=1)
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")
