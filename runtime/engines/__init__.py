"""Engines: what runs a student's graphs, one file each; `open_engines` finds those that an export left beside it."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import FewstepError
from ..wording import in_steps
from .manifest import Manifest, read_manifest, refusal

Arrays = dict[str, npt.NDArray[Any]]
"""Named arrays, batch first."""

ENGINES = ("onnx", "openvino")
"""Engines that need an export; torch runs a model directory as it is."""

TRAJECTORY, TEXT_ENCODER = "trajectory", "text_encoder"
"""Names of an export's two graphs, without the suffix."""


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
        name: `torch`, or one of `ENGINES`.
        trajectory: noise and condition to images.
        text_encoder: token ids to states; None leaves it to torch.
        draws: noise draws an image.
        sample_shape: (C, h, w) of one draw.
    """

    name: str
    trajectory: Engine
    text_encoder: Engine | None
    draws: int
    sample_shape: tuple[int, int, int]

    def __call__(self, tokens: Arrays, noise: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Images from token ids and noise."""
        image: npt.NDArray[np.float32] = self.trajectory(noise=noise, **self.condition(tokens))["image"]
        return image

    def condition(self, tokens: Arrays) -> Arrays:
        """What steers the trajectory, from token ids and their mask, by the text encoder of these engines."""
        assert self.text_encoder is not None
        return {**self.text_encoder(**tokens), "encoder_attention_mask": tokens["attention_mask"]}


Found = tuple[Path, Manifest]
"""The folder of an export and its manifest."""


def open_engines(directory: Path, wanted: str, steps: int, key: str) -> Engines | None:
    """Open the fastest engine that was exported for a student, by the times measured at its export.

    Args:
        directory: the student's.
        wanted: one of `ENGINES`, or `auto` for any, passing over what is missing or stale.
        steps: of the trajectory.
        key: `Card.engine_key(steps)`, of what the export must have been built from.

    Returns:
        The engines; None if `auto` finds none that is faster than torch.

    Raises:
        FewstepError: the wanted engine's library is missing, it was not exported for these steps, this key and
            this machine, or its files changed.
    """
    if wanted == "auto":
        usable = [found for name in ENGINES for found in _usable(directory, name, steps, key)[0]]
        best = min(usable, key=_relative_time, default=None)
        return load_engines(*best) if best and _relative_time(best) < 1 else None
    engine_module(wanted).library()
    usable, refusals = _usable(directory, wanted, steps, key)
    if not usable:
        nothing = f"{directory} has no {wanted} engine for {in_steps(steps)}"
        reason = next(iter(refusals), nothing)
        raise FewstepError(f"{reason}: run `fewstep export {directory} --to {wanted} --steps {steps}`")
    return load_engines(*min(usable, key=_relative_time))


def load_engines(folder: Path, manifest: Manifest) -> Engines:
    """Load an export's graphs, which the caller has checked."""
    load = engine_module(manifest.target).load
    trajectory, text_encoder = (load(folder, graph, manifest.precision) for graph in (TRAJECTORY, TEXT_ENCODER))
    return Engines(manifest.target, trajectory, text_encoder, manifest.draws, manifest.sample_shape)


def engine_module(name: str) -> EngineModule:
    """The file of one of `ENGINES`."""
    module: Any = importlib.import_module(f".{name}", __name__)
    engine: EngineModule = module
    return engine


def _usable(directory: Path, name: str, steps: int, key: str) -> tuple[list[Found], list[str]]:
    """Exports of one engine that may be loaded, and why the others may not."""
    usable, refusals = [], []
    for folder in sorted((directory / "engines").glob(f"{name}-*-{steps}step-*")):
        try:
            manifest = read_manifest(folder)
            reason = refusal(folder, manifest, key, engine_module(name).library())
        except FewstepError as error:
            reason = str(error)
        if reason:
            refusals.append(reason)
        else:
            usable.append((folder, manifest))
    return usable, refusals


def _relative_time(found: Found) -> float:
    """Time of an image in units of torch's, both measured in turns at export: whatever else ran then cancels out."""
    _, manifest = found
    return manifest.milliseconds["engine"] / manifest.milliseconds["torch"]
