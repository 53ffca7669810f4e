"""Where a run stands, and checkpoints: written whole or not at all, and continued by the recipe that began them."""

import json
import os
import pickle  # for the name of an error: checkpoints are read with weights_only
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ..runtime.errors import FewstepError
from ..runtime.files import atomic_path
from .trainer_config import TrainerConfig

FORMAT = 3
FREE = (
    *(f"trainer.{name}" for name in ("iterations", "minutes", "checkpoint_minutes", "log_every", "rollback")),
    "*learning_rate",
    "watchdog.*",
)
"""What may change when a run goes on: names, or patterns of names."""


class DivergenceError(FewstepError):
    """Training has gone wrong in a way that an earlier checkpoint and a lower learning rate may put right."""


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: iterations done.
        seconds: spent.
        settled: the last step at which all scalars were found finite.
        rollbacks: each has halved the learning rates.
        latest: scalars of each phase's last turn, so that phases that rest keep theirs.
        curve: the points logged.
    """

    step: int = 0
    seconds: float = 0.0
    settled: int = 0
    rollbacks: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    def fraction(self, config: TrainerConfig) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        by_time = self.seconds / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(self.step / config.iterations, by_time))

    def rate(self, config: TrainerConfig) -> float:
        """The learning rate as a share of its peak."""
        warm = min(1.0, (self.step + 1) / max(1, config.warmup))
        left = (1 - self.fraction(config)) / max(config.decay, 1e-9)
        return float(warm * min(1.0, left) * 0.5**self.rollbacks)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`; whatever fails, the earlier one stays.

    Raises:
        FewstepError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (RuntimeError, OSError) as error:  # torch reports a full disk as the former
            raise FewstepError(
                f"cannot write {path} (is the disk full?): make room and run the same command again; "
                "it continues from the checkpoint before"
            ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `write_checkpoint` wrote.

    Raises:
        FewstepError: the file is not there or damaged, or another version of fewstep wrote it.
    """
    if not path.exists():
        raise FewstepError(
            f"a process cannot see {path}, which the main process has: give an --out on a disk that all processes share"
        )
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise FewstepError(f"{path} is damaged: remove it to begin again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FewstepError(f"another version of fewstep wrote {path}: remove it to begin again")
    return state


def plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as JSON would give it back."""
    value: dict[str, Any] = json.loads(json.dumps(recipe, default=str))
    return value


def require_same_recipe(path: Path, begun: Any, given: Any, name: str = "") -> None:
    """Compare two recipes, as `plain` gives them, field by field.

    Raises:
        FewstepError: one differs that must not change while a run goes on.
    """
    if isinstance(begun, dict) and isinstance(given, dict):
        for key in sorted(begun.keys() | given.keys()):
            require_same_recipe(path, begun.get(key), given.get(key), f"{name}.{key}".lstrip("."))
    elif begun != given and not any(fnmatchcase(name, free) for free in FREE):
        raise FewstepError(
            f"{path} was begun with {name} = {begun}, and is now given {given}: "
            "go back to that to continue, or give another --out"
        )
