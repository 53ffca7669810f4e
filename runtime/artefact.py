"""What a model directory says of itself: `fewstep.json` beside diffusers' own files."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FewstepError
from .files import atomic_path, read_json, sha256_of, write_json
from .wording import in_steps

CARD, INDEX = "fewstep.json", "model_index.json"
_NOT_DRAWING = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a diffusers directory that play no part in what is drawn from a prompt."""


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
        weights: what `weights_hash` found when it was written.
        raw: everything in the file, training recipe and data included.
        guidance_range: lowest and highest scale of a student that takes the scale as an input.
    """

    kind: str
    method: str
    steps: tuple[int, ...]
    times: Mapping[str, list[float]]
    sampler: str
    guidance: float
    weights: str
    raw: Mapping[str, Any]
    guidance_range: tuple[float, float] | None = None

    def engine_key(self, steps: int | None) -> str:
        """SHA-256 of all that an engine is built from, or compared by: weights, sampler and times.

        Args:
            steps: of its trajectory; None for an export in parts, which serves all of them.
        """
        built_from = [self.weights, self.sampler, self.times if steps is None else self.times.get(str(steps))]
        return hashlib.sha256(json.dumps(built_from).encode()).hexdigest()


def read_card(directory: Path) -> Card:
    """Read and check `fewstep.json`; a plain diffusers directory without one is a teacher with diffusers' defaults.

    Raises:
        FewstepError: no such directory, no file where there must be one, or a field is missing or wrong.
    """
    _require_directory(directory)
    raw = read_json(directory / CARD) if (directory / CARD).is_file() else _plain_card(directory)
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
            guidance_range=_range(raw.get("guidance_range")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FewstepError(f"{directory / CARD} lacks or misstates {error}: make the model again") from error
    for count in card.steps:
        if len(card.times.get(str(count), [])) != count + 1:
            raise FewstepError(
                f"{directory / CARD} does not give {count + 1} times for {count} steps: make the model again"
            )
    return card


def _plain_card(directory: Path) -> dict[str, Any]:
    from .families import family_of

    guidance = family_of(directory).GUIDANCE if (directory / INDEX).is_file() else None
    if guidance is None:
        raise FewstepError(f"{directory} holds no {CARD}: give a directory that `fewstep train` finished writing")
    return {
        "kind": "teacher",
        "method": "diffusers",
        "steps": [],
        "times": {},
        "sampler": "dpm++2m",
        "guidance": guidance,
        "weights": weights_hash(directory),
    }


def _range(limits: Any) -> tuple[float, float] | None:
    if limits is None:
        return None
    low, high = (float(limit) for limit in limits)
    if low > high:
        raise ValueError(f"a guidance_range that falls from {low:g} to {high:g}")
    return low, high


def parts_of(directory: Path) -> list[str]:
    """Names of the folders that a diffusers directory's index lists and that are there.

    Raises:
        FewstepError: the index is missing or is not JSON.
    """
    _require_directory(directory)
    index = read_json(directory / INDEX)
    return [name for name, kind in index.items() if isinstance(kind, list) and (directory / name).is_dir()]


def _require_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise FewstepError(f"there is no model at {directory}: give the directory that `fewstep train` wrote")


def has_text_encoders(directory: Path) -> bool:
    """Whether a diffusers directory holds text encoders of its own.

    Raises:
        FewstepError: the index is missing or is not JSON.
    """
    return any(name.startswith("text_encoder") for name in parts_of(directory))


def require_steps(student: object, known: Sequence[int], steps: int) -> None:
    """Refuse a step count that a student was not distilled for.

    Args:
        student: what the sentence calls it.
        known: step counts of its card.
        steps: that are asked for.

    Raises:
        FewstepError: they are none of `known`.
    """
    if steps not in known:
        counts = " or ".join([*map(str, known[:-1]), in_steps(known[-1])])
        raise FewstepError(f"{student} was distilled for {counts}, not for {steps}: use --steps {known[0]}")


def weights_hash(directory: Path, prefixes: tuple[str, ...] = ("",)) -> str:
    """SHA-256 over the files of a diffusers directory's parts that decide what is drawn.

    Args:
        directory: holds `model_index.json`.
        prefixes: beginnings of the parts' names.

    Raises:
        FewstepError: the index is missing or is not JSON.
    """
    names = parts_of(directory)
    return parts_hash(directory, [name for name in names if name.startswith(prefixes) and name not in _NOT_DRAWING])


def parts_hash(directory: Path, parts: Iterable[str]) -> str:
    """SHA-256 over the files in these folders of `directory`."""
    files = sorted(path for part in parts for path in (directory / part).glob("*.*"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(directory)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def save_artefact(directory: Path, write: Callable[[Path], None], card: Mapping[str, Any]) -> None:
    """Write a model: `write` fills a temporary folder with diffusers' files, which then replace those of `directory`.

    diffusers' index is removed first and written last, so that an interrupted save never looks like a model. Folders
    that the model before had and this one lacks go; what no model wrote stays.
    """
    with atomic_path(directory / ".weights") as staging:
        staging.mkdir()
        write(staging)
        folders = sorted(part.name for part in staging.iterdir() if part.is_dir())
        write_json(staging / CARD, {**card, "folders": folders, "weights": weights_hash(staging)})
        (directory / INDEX).unlink(missing_ok=True)
        _remove_folders(directory, except_for=folders)
        for part in sorted(staging.iterdir(), key=lambda part: part.name == INDEX):
            with atomic_path(directory / part.name) as temporary:
                part.rename(temporary)
    (directory / ".weights").rmdir()


def _remove_folders(directory: Path, except_for: Sequence[str]) -> None:
    """Remove what the card says that the model before consists of."""
    written = read_json(directory / CARD).get("folders", ()) if (directory / CARD).is_file() else ()
    for path in directory.iterdir():
        if path.is_dir() and path.name in written and path.name not in except_for:
            shutil.rmtree(path)
