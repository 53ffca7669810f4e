"""Pictures of results: grids of images and curves of losses."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import require
from ..runtime.files import atomic_path


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one PNG, row by row, two white pixels apart."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for index, image in enumerate(pixels):
        corner = (index % columns * (width + 2), index // columns * (height + 2))
        canvas.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), corner)
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")


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
