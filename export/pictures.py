"""Pictures of a refused engine: torch's, the engine's, and how they differ."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..runtime.files import atomic_path

SMALLEST = 128
"""Pixels a side, below which pictures are enlarged by a whole number."""


def save_side_by_side(expected: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8], path: Path) -> None:
    """Write a PNG with a row for each image: expected, found, and their difference, the largest of the row at white.

    Args:
        expected: (B, H, W, 3).
        found: the same shape.
        path: the file.
    """
    error = np.abs(found.astype(int) - expected)
    largest = np.maximum(error.max(axis=(1, 2, 3), keepdims=True), 1)
    rows = np.concatenate([expected, found, (255 * error // largest).astype(np.uint8)], axis=2)
    factor = -(-SMALLEST // rows.shape[1])
    sheet = rows.reshape(-1, *rows.shape[2:]).repeat(factor, axis=0).repeat(factor, axis=1)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
