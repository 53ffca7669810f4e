"""Engines: what runs a student's graphs, one file each; `open_engines` finds those that an export left beside it."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import FewstepError
from ..wording import in_steps
from .manifest import KERNELS, PARTS, Manifest, State, damage, kind_of, mismatch, read_manifest, touch

T = TypeVar("T")
Arrays = dict[str, npt.NDArray[Any]]
"""Named arrays, batch first."""

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("fp32", "int8", "int8static", "w8", "w4"),
    "openvino": ("bf16", "fp32", "w8", "w4"),
    "tensorrt": ("fp16", "bf16", "fp32", "fp8"),
    "aoti": ("fp32", "bf16"),
}
"""What each can be exported in where the machine allows all of it; the first that it allows is the default."""
ENGINES = tuple(PRECISIONS)
"""Engines that need an export."""
TORCH, COMPILED = "torch", "torch-compiled"
"""Engines that run a model directory as it is; the second compiles it for each batch size, which takes a minute."""

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


Preview = Callable[[npt.NDArray[np.uint8]], None]
"""Takes pixels (B, H, W, 3)."""


@dataclass(frozen=True)
class Engines:
    """All that runs for one student and step count.

    Args:
        name: `torch`, or one of `ENGINES`; with `-int8` behind it if its images are not those of full precision.
        trajectory: noise and condition to `PIXELS`.
        text_encoder: token ids to states; None leaves it to torch.
        draws: noise draws an image.
        sample_shape: (C, h, w) of one draw.
        prompts: prompts to what steers the trajectory, where the text encoder is not its own engine.
        reason: why these were taken, where there was a choice.
        watched: the same, showing what each evaluation foresees; None where one call does all.
    """

    name: str
    trajectory: Engine
    text_encoder: Engine | None
    draws: int
    sample_shape: tuple[int, int, int]
    prompts: Callable[[Sequence[str]], Arrays] | None = None
    reason: str = ""
    watched: "Callable[[Preview], Engines] | None" = None

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
    """Open a trajectory that was exported for a student; see `open_fitting`."""
    return open_fitting(directory, wanted, {steps: key}, open_export)


def open_fitting(directory: Path, wanted: str, keys: Mapping[int | None, str], open_found: Callable[[Found], T]) -> T:
    """Open an export of a model; of several precisions, the fastest when they were exported.

    Args:
        directory: the model's.
        wanted: one of `ENGINES`, or more of a `Manifest.name`, such as `onnx-int8`, `onnx-fp32-kernels`, `onnx-parts`.
        keys: `Card.engine_key(steps)`, of what the export must have been built from, by the steps of its trajectory,
            None standing for exports in parts; the first are preferred.
        open_found: opens one, or raises `FewstepError`.

    Raises:
        FewstepError: the engine's library is missing, it was not exported for these steps, this key and this machine,
            or its files changed.
    """
    target, variant, in_parts = _read_name(wanted)
    engine_module(target).library()
    keys = {steps: key for steps, key in keys.items() if steps is None or not in_parts}
    refusals: list[str] = []
    for steps, key in keys.items():
        usable, reasons = find_exports(directory, wanted, steps, key)
        refusals += reasons
        for found in sorted(usable, key=_relative_time):
            try:
                return open_found(found)
            except FewstepError as error:
                refusals.append(str(error))
    steps = next(iter(keys))
    command = f"fewstep export {directory} --to {target} "
    command += "--shape parts" if steps is None else f"--steps {steps}"
    command += f" --precision {variant.removesuffix(KERNELS)}" if variant else ""
    command += " --kernels" if variant.endswith(KERNELS) else ""
    nothing = f"{directory} has no {wanted} engine" + (f" for {in_steps(steps)}" if steps else "")
    raise FewstepError(f"{next(iter(refusals), nothing)}: run `{command}`")


def find_exports(directory: Path, wanted: str, steps: int | None, key: str) -> tuple[list[Found], list[str]]:
    """Exports that fit by their manifests, and why others do not.

    Args:
        directory: the model's.
        wanted: as for `open_fitting`.
        steps: of the trajectory; None for exports in parts.
        key: `Card.engine_key(steps)`.
    """
    usable, refusals = [], []
    target, variant, in_parts = _read_name(wanted)
    if in_parts and steps is not None:
        return [], []
    for folder in sorted((directory / "engines").glob(f"{kind_of(target, variant or '*', steps)}-*")):
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
    check_and_touch(found)
    return load_engines(*found)


def check_and_touch(found: Found) -> None:
    """Note the use of an export that is every byte as it was written; `FewstepError` if a file changed."""
    folder, manifest = found
    if reason := damage(folder, manifest):
        raise FewstepError(reason)
    touch(folder)


def load_engines(folder: Path, manifest: Manifest) -> Engines:
    """Load an export's graphs, which the caller has checked."""
    load = engine_module(manifest.target).load
    trajectory, text_encoder = (load(folder, graph, manifest.precision) for graph in (TRAJECTORY, TEXT_ENCODER))
    return Engines(manifest.engine, trajectory, text_encoder, manifest.draws, manifest.sample_shape)


def engine_module(name: str) -> EngineModule:
    """The file of one of `ENGINES`."""
    module: Any = importlib.import_module(f".{name}", __name__)
    engine: EngineModule = module
    return engine


def _read_name(wanted: str) -> tuple[str, str, bool]:
    """Target, variant, which is empty for any, and whether only parts are meant, of what somebody asks for."""
    target, _, variant = wanted.removesuffix(PARTS).partition("-")
    return target, variant, wanted.endswith(PARTS)


def _relative_time(found: Found) -> float:
    """Time of an image in units of torch's, both measured in turns at export: whatever else ran then cancels out."""
    _, manifest = found
    return manifest.milliseconds["engine"] / manifest.milliseconds["torch"]
