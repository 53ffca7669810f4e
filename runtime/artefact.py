"""What a model directory says of itself: `fewstep.json` beside diffusers' own files."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FewstepError
from .files import atomic_path, read_json, sha256_of, write_json

CARD = "fewstep.json"


@dataclass(frozen=True)
class Card:
    """The parts of `fewstep.json` that generation needs.

    Args:
        kind: `teacher` or `student`.
        method: what trained it.
        steps: step counts it was distilled for, the first being the default; empty for a teacher, which takes any.
        times: for each of them, as text, the `steps + 1` times in [0, 1].
        sampler: a name in `samplers.SAMPLERS`.
        guidance: the teacher's default scale, or what the student was distilled with (and no longer needs).
        weights: SHA-256 over the network's and the decoder's weight files.
        raw: everything in the file, training recipe and data included.
    """

    kind: str
    method: str
    steps: tuple[int, ...]
    times: Mapping[str, list[float]]
    sampler: str
    guidance: float
    weights: str
    raw: Mapping[str, Any]


def read_card(directory: Path) -> Card:
    """Read and check `fewstep.json`.

    Raises:
        FewstepError: no such directory or file, or a field is missing or wrong.
    """
    if not directory.is_dir():
        raise FewstepError(f"there is no model at {directory}: give the directory that `fewstep train` wrote")
    if not (directory / CARD).is_file():
        raise FewstepError(f"{directory} holds no {CARD}: give a directory that `fewstep train` finished writing")
    raw = read_json(directory / CARD)
    try:
        card = Card(
            kind=raw["kind"],
            method=raw["method"],
            steps=tuple(int(count) for count in raw["steps"]),
            times={str(count): [float(t) for t in times] for count, times in raw["times"].items()},
            sampler=raw["sampler"],
            guidance=float(raw["guidance"]),
            weights=raw["weights"],
            raw=raw,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FewstepError(f"{directory / CARD} lacks or misstates {error}: make the model again") from error
    for count in card.steps:
        if len(card.times.get(str(count), [])) != count + 1:
            raise FewstepError(
                f"{directory / CARD} does not give {count + 1} times for {count} steps: make the model again"
            )
    return card


def weights_hash(directory: Path) -> str:
    """SHA-256 over the weight files of a diffusers directory and their configs."""
    files = sorted(path for folder in ("transformer", "vae", "scheduler") for path in (directory / folder).glob("*.*"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(directory)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def save_artefact(directory: Path, write: Callable[[Path], None], card: Mapping[str, Any]) -> None:
    """Write a model: `write` fills a temporary folder with diffusers' files, which then replace those of `directory`.

    The card is removed first and written last, so that an interrupted save never looks like a model.
    """
    (directory / CARD).unlink(missing_ok=True)
    with atomic_path(directory / ".weights") as staging:
        staging.mkdir()
        write(staging)
        for part in sorted(staging.iterdir()):
            with atomic_path(directory / part.name) as temporary:
                part.rename(temporary)
    (directory / ".weights").rmdir()
    write_json(directory / CARD, {**card, "weights": weights_hash(directory)})
