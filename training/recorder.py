"""What a run leaves to look at: curve, TensorBoard's events, memory."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from ..runtime.errors import require
from ..runtime.files import atomic_path, write_json
from .picture import save_curves

DRAW_SECONDS = 30
"""Between plots of the curve, which take longer than a checkpoint."""


class Recorder:
    """Writes into a run's folder.

    Args:
        folder: receives `curve.jsonl`, `curve.png`, `memory.json` and `tensorboard/`.
        step: at which the run goes on; TensorBoard forgets what came after it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        require("matplotlib", "train")  # better missed now than at the first checkpoint
        require("tensorboard", "train")
        from torch.utils.tensorboard import SummaryWriter

        for leftover in folder.glob(".*.part"):  # of a run that was killed while it wrote
            leftover.unlink()
        self.folder, self.drawn = folder, -math.inf
        self.events: Any = SummaryWriter(folder / "tensorboard", purge_step=step)

    def point(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show the scalars of one step in TensorBoard."""
        for name, value in scalars.items():
            self.events.add_scalar(name, value, step)

    def pictures(self, step: int, files: Iterable[Path]) -> None:
        """Show picture files in TensorBoard, under their names."""
        for file in files:
            with Image.open(file) as picture:
                self.events.add_image(file.stem, numpy.asarray(picture), step, dataformats="HWC")

    def save(self, curve: Sequence[dict[str, float]], memory: Mapping[str, Any], last: bool) -> None:
        """Write the curve so far and what memory the run takes; the plot is drawn now and then, and the last time."""
        with atomic_path(self.folder / "curve.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(point) + "\n" for point in curve))
        write_json(self.folder / "memory.json", memory)
        self.events.flush()
        if curve and (last or time.monotonic() > self.drawn + DRAW_SECONDS):
            save_curves(curve, self.folder / "curve.png")
            self.drawn = time.monotonic()

    def close(self) -> None:
        """Finish TensorBoard's file."""
        self.events.close()


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The points that training logged into `folder`."""
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
