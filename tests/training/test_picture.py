"""Grids and curves land where they should, whole."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fewstep.training.picture import save_curves, save_grid


def test_grid_lays_images_row_by_row_two_white_pixels_apart(tmp_path: Path) -> None:
    levels = torch.tensor([-1.0, 0.0, 1.0, -5.0, 5.0])  # what lies outside of [-1, 1] is cut off
    save_grid(levels.reshape(-1, 1, 1, 1).expand(-1, 3, 4, 6), tmp_path / "grid.png", columns=3)
    pixels = numpy.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * (4 + 2), 3 * (6 + 2), 3)
    seen = [int(pixels[row * 6 + 1, column * 8 + 1, 0]) for row in range(2) for column in range(3)]
    assert seen == [0, 128, 255, 0, 255, 255]  # the sixth place stays white
    assert (pixels[4:6] == 255).all()
    assert (pixels[:, 6:8] == 255).all()
    assert (pixels[:4, :6] == 0).all()
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("points", [1, 200])
def test_curves_are_drawn_also_for_what_is_not_in_every_point(points: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = [{"step": float(step), "seconds": 0.1 * step, "fake/loss": 1 / (1 + step)} for step in range(points)]
    curve[-1]["student/loss"] = 0.5
    save_curves(curve, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        image.load()
        assert image.width > image.height  # two panels side by side
