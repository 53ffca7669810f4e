"""When the stages of a generation end, on the device's own clock; inside a CUDA graph, too."""

import time
from collections import defaultdict
from typing import Any

import torch


class Timeline:
    """Marks at the ends of stages; the first mark is the beginning.

    Args:
        device: whose clock counts.
        captured: the marks are made while a CUDA graph is captured, and hold the times of its last replay.
    """

    def __init__(self, device: torch.device, captured: bool = False) -> None:
        self.device, self.captured = device, captured
        self.marks: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        """The stage ends here."""
        if self.device.type != "cuda":
            self.marks.append((stage, time.perf_counter()))
            return
        event: Any = torch.cuda.Event(enable_timing=True, external=self.captured)
        event.record()
        self.marks.append((stage, event))

    def milliseconds(self) -> dict[str, float]:
        """Of each stage, all its turns together; the device must have finished."""
        total: defaultdict[str, float] = defaultdict(float)
        for (_, before), (stage, after) in zip(self.marks, self.marks[1:], strict=False):
            cuda = self.device.type == "cuda"
            total[stage] += before.elapsed_time(after) if cuda else 1000 * (after - before)
        return dict(total)
