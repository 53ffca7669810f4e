"""A sheet of pictures: what the captions look like in the data, and what each model made of them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ...runtime.files import atomic_path

TILE, GAP, LINE, COLUMNS = 128, 8, 13, 6
CAPTION_LINES, CAPTION_WIDTH = 3, 24


def save_sheet(rows: Mapping[str, npt.NDArray[np.uint8]], captions: Sequence[str], path: Path) -> None:
    """Write a PNG of columns, six side by side: the pictures of one caption, one of each row, over the caption.

    Args:
        rows: (N, H, W, 3) uint8 by name, from top to bottom.
        captions: N of them.
        path: the file.
    """
    width, height = TILE + GAP, len(rows) * TILE + CAPTION_LINES * LINE + GAP
    lines_of_columns = -(-len(captions) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * width + GAP, lines_of_columns * height + LINE + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=10)
    draw.text((GAP, 2), f"from top to bottom: {', '.join(rows)}", fill="black", font=font)
    for position, (caption, *pictures) in enumerate(zip(captions, *rows.values(), strict=True)):
        x, y = GAP + position % COLUMNS * width, LINE + GAP + position // COLUMNS * height
        for row, pixels in enumerate(pictures):
            # BOX repeats pixels when it enlarges, so that nothing is smoothed over.
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BOX)
            canvas.paste(tile, (x, y + row * TILE))
        lines = textwrap.wrap(caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder="…")
        draw.multiline_text((x, y + len(rows) * TILE + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")
