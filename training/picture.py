"""Pictures of results: grids of images and curves of losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..runtime.errors import require
from ..runtime.files import atomic_path


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one PNG, row by row, two white pixels apart."""
    _write(_grid(images, columns), path)


def save_rows(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write rows of images (N, 3, H, W) in [-1, 1], each after its name, as one PNG."""
    images, font = list(rows.values()), ImageFont.load_default()
    grid = _grid(torch.cat(images), columns=len(images[0]))
    margin = 8 + round(max(map(font.getlength, rows)))
    canvas = Image.new("RGB", (margin + grid.width, grid.height), "white")
    canvas.paste(grid, (margin, 0))
    for number, name in enumerate(rows):
        ImageDraw.Draw(canvas).text((4, number * grid.height // len(rows) + 4), name, "black", font)
    _write(canvas, path)


def _grid(images: Tensor, columns: int) -> Image.Image:
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for index, image in enumerate(pixels):
        corner = (index % columns * (width + 2), index // columns * (height + 2))
        canvas.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), corner)
    return canvas


def _write(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def save_curves(curve: Sequence[dict[str, float]], path: Path) -> None:
    """Plot every logged scalar against the step, one panel each, with a running mean over it."""
    require("matplotlib", "train")
    from matplotlib.figure import Figure

    names = sorted({name for point in curve for name in point} - {"step", "seconds"})
    figure = Figure(figsize=(4 * min(3, len(names)), 2.6 * -(-len(names) // 3)), layout="constrained")
    for position, name in enumerate(names, 1):
        axes = figure.add_subplot(-(-len(names) // 3), min(3, len(names)), position)
        points = [(point["step"], point[name]) for point in curve if name in point]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, alpha=0.3, linewidth=0.8)
        window = max(1, len(values) // 30)
        smooth = torch.tensor(values).unfold(0, window, 1).mean(1)
        axes.plot(steps[window - 1 :], smooth, linewidth=1.5)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
