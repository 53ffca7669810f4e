"""Engines: `engine(**named_arrays) -> named_arrays`, one file each, imported when first used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


class Engine(Protocol):
    """Anything that runs a graph."""

    name: str

    def __call__(self, **arrays: np.ndarray) -> Arrays:
        """Run once on inputs by name."""
        ...


@dataclass(frozen=True)
class Engines:
    """What one generation runs on.

    Args:
        name: the engine's, for people.
        trajectory: noise and condition to `image`.
        text_encoder: token ids to `encoder_hidden_states`; None where torch encodes the text.
        draws: noise draws an image.
        sample_shape: (C, h, w) of one draw.
    """

    name: str
    trajectory: Engine
    text_encoder: Engine | None
    draws: int
    sample_shape: tuple[int, int, int]


def open_engines(directory: Path, wanted: str, steps: int, weights: str) -> Engines | None:
    """Open what was exported of a student (provisional: the exporter's author replaces this)."""
    return None
