"""Engines: what runs a student's graphs, one file each; `open_engines` finds those that an export left beside it."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import FewstepError
from ..wording import in_steps
from .manifest import Manifest, State, damage, mismatch, read_manifest, touch

Arrays = dict[str, npt.NDArray[Any]]
"""Named arrays, batch first."""

ENGINES = ("onnx", "openvino", "tensorrt")
"""Engines that need an export; torch runs a model directory as it is."""

TRAJECTORY, TEXT_ENCODER = "trajectory", "text_encoder"
"""Names of an export's two graphs, without the suffix."""

PIXELS = "pixels"
"""Name of what a trajectory gives: (B, H, W, 3) uint8."""


class Engine(Protocol):
    """One graph, ready to run."""

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the graph on inputs of one batch size, by name; safe to call from several threads."""
        ...


class EngineModule(Protocol):
    """What each file of this folder offers, but torch's, which needs no export."""

    def load(self, folder: Path, graph: str, precision: str) -> Engine:
        """Load `TRAJECTORY` or `TEXT_ENCODER` of an export; `FewstepError` if the library is missing."""
        ...

    def library(self) -> str:
        """Name and version of the library, and what it runs on; `FewstepError` if it is missing."""
        ...


@dataclass(frozen=True)
class Engines:
    """All that runs for one student and step count.

    Args:
        name: `torch`, or one of `ENGINES`; with `-int8` behind it if its images are not those of full precision.
        trajectory: noise and condition to `PIXELS`.
        text_encoder: token ids to states; None leaves it to torch.
        draws: noise draws an image.
        sample_shape: (C, h, w) of one draw.
        reason: why these were taken, where there was a choice.
    """

    name: str
    trajectory: Engine
    text_encoder: Engine | None
    draws: int
    sample_shape: tuple[int, int, int]
    reason: str = ""

    def __call__(self, tokens: Arrays, noise: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Pixels (B, H, W, 3) from token ids and noise."""
        pixels: npt.NDArray[np.uint8] = self.trajectory(noise=noise, **self.condition(tokens))[PIXELS]
        return pixels

    def condition(self, tokens: Arrays) -> Arrays:
        """What steers the trajectory, from token ids and their mask, by the text encoder of these engines."""
        assert self.text_encoder is not None
        return {**self.text_encoder(**tokens), "encoder_attention_mask": tokens["attention_mask"]}


Found = tuple[Path, Manifest]
"""The folder of an export and its manifest."""


def open_engines(directory: Path, wanted: str, steps: int, key: str) -> Engines:
    """Open an engine that was exported for a student; of several precisions, the fastest when they were exported.

    Args:
        directory: the student's.
        wanted: one of `ENGINES`, or with a precision, such as `onnx-int8`.
        steps: of the trajectory.
        key: `Card.engine_key(steps)`, of what the export must have been built from.

    Raises:
        FewstepError: the engine's library is missing, it was not exported for these steps, this key and this machine,
            or its files changed.
    """
    target, _, precision = wanted.partition("-")
    engine_module(target).library()
    usable, refusals = find_exports(directory, wanted, steps, key)
    for found in sorted(usable, key=_relative_time):
        try:
            return open_export(found)
        except FewstepError as error:
            refusals.append(str(error))
    command = f"fewstep export {directory} --to {target} --steps {steps}"
    command += f" --precision {precision}" if precision else ""
    nothing = f"{directory} has no {wanted} engine for {in_steps(steps)}"
    raise FewstepError(f"{next(iter(refusals), nothing)}: run `{command}`")


def find_exports(directory: Path, wanted: str, steps: int, key: str) -> tuple[list[Found], list[str]]:
    """Exports that fit by their manifests, and why others do not; arguments as for `open_engines`."""
    usable, refusals = [], []
    target, _, precision = wanted.partition("-")
    for folder in sorted((directory / "engines").glob(f"{target}-{precision or '*'}-{steps}step-*")):
        try:
            manifest = read_manifest(folder)
            state, reason = mismatch(folder, manifest, key, engine_module(target).library())
        except FewstepError as error:
            state, reason = State.DAMAGED, str(error)
        if state is State.READY:
            usable.append((folder, manifest))
        else:
            refusals.append(reason)
    return usable, refusals


def open_export(found: Found) -> Engines:
    """Load an export, every byte of it as it was written.

    Raises:
        FewstepError: a file changed, or the library refuses it.
    """
    folder, manifest = found
    if reason := damage(folder, manifest):
        raise FewstepError(reason)
    touch(folder)
    return load_engines(folder, manifest)


def load_engines(folder: Path, manifest: Manifest) -> Engines:
    """Load an export's graphs, which the caller has checked."""
    load = engine_module(manifest.target).load
    trajectory, text_encoder = (load(folder, graph, manifest.precision) for graph in (TRAJECTORY, TEXT_ENCODER))
    name = f"{manifest.target}-int8" if manifest.precision == "int8" else manifest.target
    return Engines(name, trajectory, text_encoder, manifest.draws, manifest.sample_shape)


def engine_module(name: str) -> EngineModule:
    """The file of one of `ENGINES`."""
    module: Any = importlib.import_module(f".{name}", __name__)
    engine: EngineModule = module
    return engine


def _relative_time(found: Found) -> float:
    """Time of an image in units of torch's, both measured in turns at export: whatever else ran then cancels out."""
    _, manifest = found
    return manifest.milliseconds["engine"] / manifest.milliseconds["torch"]
