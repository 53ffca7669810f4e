"""The engines that lie beside a student: a cache of bounded size, which one process at a time changes."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from ..artefact import Card, read_card
from ..errors import FewstepError
from ..files import remove
from . import ENGINES, engine_module
from .manifest import MANIFEST, OtherFormatError, State, damage, kind_of, mismatch, read_manifest

LOCK = ".engines.lock"
"""Beside the engines' folder, which comes and goes; never removed, since those who wait for it hold the old file."""
BOUND, DEFAULT_BOUND = "FEWSTEP_ENGINES_GIB", 16.0
"""The variable that bounds the size of a student's engines, and what holds without it."""
GIB = 1024**3
_FOLDER = re.compile(
    r"(?P<target>[a-z]+)-(?P<precision>[a-z0-9]+(?:-kernels)?)-(?:(?P<steps>[0-9]+)step|parts)-[0-9a-f]{8}"
)
_LEFTOVER = re.compile(rf"\.{_FOLDER.pattern}\.[0-9]+\.part")


@dataclass(frozen=True)
class StoredEngine:
    """One engine of a student.

    Args:
        folder: where it lies.
        target: one of `engines.ENGINES`.
        precision: of the arithmetic, with `-kernels` behind it where they are nodes, as in `Manifest.variant`.
        steps: network evaluations in the graph; None for an export in parts.
        size: bytes.
        last_used: seconds since 1970.
        state: what it is good for.
        reason: why it is not ready, as the beginning of a sentence; empty if it is.
    """

    folder: Path
    target: str
    precision: str
    steps: int | None
    size: int
    last_used: float
    state: State
    reason: str

    @property
    def kind(self) -> str:
        """What a machine keeps one of."""
        return kind_of(self.target, self.precision, self.steps)


def list_engines(directory: Path, thorough: bool = False) -> list[StoredEngine]:
    """Every engine of a student, the most recently used first.

    Args:
        directory: the student's.
        thorough: whether to read every file and compare its hash, as loading does.

    Raises:
        FewstepError: the directory is not a model.
    """
    card, root = read_card(directory), directory / "engines"
    folders = [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []
    found = [_inspect(folder, name, card, thorough) for folder in folders if (name := _FOLDER.fullmatch(folder.name))]
    return sorted(found, key=lambda engine: (-engine.last_used, engine.folder.name))


def surplus(directory: Path, bound: float) -> list[StoredEngine]:
    """Which engines should go, and why: what no machine can use again, then the longest unused beyond `bound` bytes.

    Engines of another machine are usable: it may share the folder.

    Raises:
        FewstepError: the directory is not a model.
    """
    engines = list_engines(directory, thorough=True)
    useless = [engine for engine in engines if engine.state in (State.STALE, State.DAMAGED)]
    return [*useless, *beyond([engine for engine in engines if engine not in useless], bound)]


def beyond(engines: Sequence[StoredEngine], bound: float) -> list[StoredEngine]:
    """The longest unused, which exceed `bound` bytes together with all used since; never the most recently used.

    Args:
        engines: the most recently used first.
        bound: bytes.
    """
    sizes = accumulate(engine.size for engine in engines)
    reason = f"is among the longest unused, beyond {bound / GIB:g} GiB"
    return [
        replace(engine, reason=f"the engine in {engine.folder} {reason}")
        for position, (engine, size) in enumerate(zip(engines, sizes, strict=True))
        if position and size > bound
    ]


def remove_engine(folder: Path) -> None:
    """Remove an engine so that no reader meets half of it; call it under `exclusive`."""
    dying = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    folder.rename(dying)
    remove(dying)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Be the only one who changes a student's engines; whoever comes second says so and waits.

    The kernel frees the lock of a process that was killed; what it left half-written goes now.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"fewstep: waiting for another process that changes the engines of {directory}", file=sys.stderr)
        lock.acquire()
    try:
        for leftover in (directory / "engines").glob(".*.part"):
            if _LEFTOVER.fullmatch(leftover.name):
                remove(leftover)
        yield
    finally:
        lock.release()


def engines_bound() -> float:
    """Bytes that a student's engines may take, from the environment.

    Raises:
        FewstepError: the variable is not a positive number.
    """
    text = os.environ.get(BOUND, "")
    try:
        bound = float(text or DEFAULT_BOUND)
    except ValueError:
        bound = 0.0
    if not bound > 0:
        raise FewstepError(
            f"{BOUND} is {text!r}, which is no size: set it to the GiB that a student's engines may take"
        )
    return bound * GIB


def _inspect(folder: Path, name: re.Match[str], card: Card, thorough: bool) -> StoredEngine:
    files = [file for file in folder.rglob("*") if file.is_file()]
    used = folder / MANIFEST if (folder / MANIFEST).is_file() else folder
    steps = int(name["steps"]) if name["steps"] else None
    state, reason = _state(folder, name["target"], card.engine_key(steps), thorough)
    size = sum(file.stat().st_size for file in files)
    return StoredEngine(folder, name["target"], name["precision"], steps, size, used.stat().st_mtime, state, reason)


def _state(folder: Path, target: str, key: str, thorough: bool) -> tuple[State, str]:
    if target not in ENGINES:
        return State.UNABLE, f"the engine in {folder} is for {target}, which this version of fewstep does not know"
    try:
        manifest = read_manifest(folder)
    except OtherFormatError as error:
        return State.STALE, str(error)
    except FewstepError as error:
        return State.DAMAGED, str(error)
    try:
        library = engine_module(target).library()
    except FewstepError as error:
        return State.UNABLE, str(error)
    state, reason = mismatch(folder, manifest, key, library)
    if state is State.READY and thorough:
        reason = damage(folder, manifest)
        state = State.DAMAGED if reason else State.READY
    return state, reason
