"""What an export says of itself: `manifest.json` beside its graphs. An engine is loaded only if all of it holds."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FewstepError
from ..files import read_json, sha256_of, write_json
from .device import Device, this_device

MANIFEST = "manifest.json"
FORMAT = 3
"""Raised whenever the exporter makes other graphs, or this file other fields, so that older exports are made again."""

QUANTISED = ("int8", "int8static", "fp8", "w8", "w4")
"""Precisions of few bits: what they draw differs visibly, and should be scored."""
_NOT_KEYED = ("sensitive", "nodes", "calibration", "files", "milliseconds", "report", "quality")
KERNELS, PARTS = "-kernels", "-parts"
"""Behind a precision: our kernels are nodes of the graphs; behind that: each network is a graph of its own."""
"""What comes out of a build; all else goes into it, and into the key."""


class OtherFormatError(FewstepError):
    """A manifest of another `FORMAT`."""


class State(StrEnum):
    """What an export is good for, here and now."""

    READY = "ready"
    STALE = "stale"
    ELSEWHERE = "other machine"
    DAMAGED = "damaged"
    UNABLE = "cannot run"


@dataclass(frozen=True)
class Manifest:
    """An export and what it holds for.

    Args:
        format: `FORMAT` when it was made.
        target: one of `engines.ENGINES`.
        precision: of the arithmetic, such as `fp32` or `bf16`.
        steps: network evaluations in the graph; None in an export in parts, which a sampler calls at any step count.
        built_from: `Card.engine_key` of the model and the steps.
        graphs: SHA-256 of each graph as ONNX, before the target took it, by name.
        shapes: of the inputs and outputs of each graph, by name, the batch as `batch`.
        sensitive: what was kept in higher precision than `precision`, by the rule that named it.
        kernels: as `kernel_versions()` gives them.
        library: the engine's library, its version and what it runs on.
        device: the machine.
        files: SHA-256 of every other file of the folder and its folders, by path.
        milliseconds: median time of one image, prompt to pixels, with this `engine` and with `torch`.
        report: name of the file that says how its results differ from torch's.
        calibration: what samples its activations were scaled by, if they were beforehand.
        nodes: how many nodes our kernels have, by graph and operator.
        quality: scores of `torch` and of this `engine`, and the `largest_drop`; empty if they were never compared.
    """

    format: int
    target: str
    precision: str
    steps: int | None
    built_from: str
    graphs: Mapping[str, str]
    shapes: Mapping[str, Mapping[str, Sequence[int | str]]]
    sensitive: Mapping[str, Any]
    kernels: Mapping[str, str]
    library: str
    device: Device
    files: Mapping[str, str]
    milliseconds: Mapping[str, float]
    report: str
    calibration: Mapping[str, Any] = field(default_factory=dict)
    nodes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """`fused`, a whole trajectory as one graph, or `parts`."""
        return "parts" if self.steps is None else "fused"

    @property
    def engine(self) -> str:
        """What its engines are called: those of few bits draw other pictures than full precision."""
        return f"{self.target}-{self.precision}" if self.precision in QUANTISED else self.target

    @property
    def variant(self) -> str:
        """The precision, with `KERNELS` behind it where they are nodes."""
        return f"{self.precision}{KERNELS if self.nodes else ''}"

    @property
    def name(self) -> str:
        """What opens it and nothing else on this machine, such as `onnx-fp32` or `onnx-fp32-kernels-parts`."""
        return f"{self.target}-{self.variant}{PARTS if self.steps is None else ''}"

    @property
    def draws(self) -> int:
        """Noise draws an image of a fused export."""
        return int(self.shapes["trajectory"]["noise"][1])

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one draw of a fused export."""
        _, _, channels, height, width = self.shapes["trajectory"]["noise"]
        return int(channels), int(height), int(width)

    @property
    def folder_name(self) -> str:
        """What its folder is called; the last eight digits differ with all that the engine is built from and for."""
        keyed = {name: value for name, value in asdict(self).items() if name not in _NOT_KEYED}
        key = hashlib.sha256(json.dumps(keyed, sort_keys=True).encode()).hexdigest()[:8]
        return f"{kind_of(self.target, self.variant, self.steps)}-{key}"


def kind_of(target: str, variant: str, steps: int | None) -> str:
    """What a machine keeps one engine of: the beginning of a folder's name. Without steps it is an export in parts."""
    return f"{target}-{variant}{PARTS if steps is None else f'-{steps}step'}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into an export's folder."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read an export's `manifest.json`.

    Raises:
        OtherFormatError: it is of another `FORMAT`.
        FewstepError: it is missing, or not what `write_manifest` wrote for this folder.
    """
    if not (folder / MANIFEST).is_file():
        raise FewstepError(f"the engine in {folder} lacks its {MANIFEST}")
    raw = read_json(folder / MANIFEST)
    try:
        if raw.get("format") != FORMAT:
            raise OtherFormatError(f"the engine in {folder} was exported by another version of fewstep")
        manifest = Manifest(**{**raw, "device": Device(**raw["device"])})
        if not all(isinstance(raw[name], dict) for name in ("graphs", "shapes", "sensitive", "kernels", "files")):
            raise ValueError("what should be a table")
        if not all(float(manifest.milliseconds[name]) > 0 for name in ("engine", "torch")) or not manifest.files:
            raise ValueError("its times or files")
        if manifest.shape == "fused" and (manifest.draws < 1 or min(manifest.sample_shape) < 1):
            raise ValueError("its shapes")
        if set(manifest.graphs) != set(manifest.shapes):
            raise ValueError("whose shapes it gives")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest.files):
            raise ValueError("files that lie elsewhere")
        if folder.name != manifest.folder_name:
            raise ValueError("what its folder is named for")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FewstepError(f"{folder / MANIFEST} lacks or misstates {error}") from error
    return manifest


def refusal(folder: Path, manifest: Manifest, key: str, library: str) -> str:
    """Why an export may not be loaded, as the beginning of a sentence; empty if it may.

    Args:
        folder: the export's.
        manifest: its manifest.
        key: `Card.engine_key` of the student as it is now.
        library: what the engine's library is now.
    """
    return mismatch(folder, manifest, key, library)[1] or damage(folder, manifest)


def mismatch(folder: Path, manifest: Manifest, key: str, library: str) -> tuple[State, str]:
    """What an export was made from or for that is no longer so, and as the beginning of a sentence; see `refusal`."""
    here, engine = this_device(), f"the engine in {folder} was built"
    if manifest.built_from != key:
        return State.STALE, f"{engine} from other weights or for other times"
    if manifest.device.name != here.name:
        return State.ELSEWHERE, f"{engine} on another machine ({manifest.device.name})"
    if manifest.library != library:
        return State.STALE, f"{engine} with {manifest.library}, and this is {library}"
    if manifest.device != here:
        return State.STALE, f"{engine} for {_driver(manifest.device)}, and here is {_driver(here)}"
    changed = sorted(name for name, _ in manifest.kernels.items() ^ kernel_versions().items())
    if changed:
        return State.STALE, f"{engine} with other versions of {', '.join(dict.fromkeys(changed))}"
    return State.READY, ""


def damage(folder: Path, manifest: Manifest) -> str:
    """Which file is missing, foreign or changed, as the beginning of a sentence; empty if none is. Reads every byte."""
    foreign = set(files_in(folder)) - {*manifest.files, MANIFEST}
    if foreign:
        return f"the engine in {folder} is not what was exported: it holds the foreign file {min(foreign)}"
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"the engine in {folder} lacks its file {name}"
        if sha256_of(path) != digest:
            return f"the engine in {folder} is not what was exported: its file {name} changed"
    return ""


def files_in(folder: Path) -> dict[str, Path]:
    """Every file of a folder and its folders, by its path in there; what is no folder of its own counts as a file."""
    found = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in found}


def touch(folder: Path) -> None:
    """Note that an engine is used: the time of its manifest is when it last was. A read-only folder keeps its own."""
    with suppress(OSError):
        os.utime(folder / MANIFEST)


@cache
def kernel_versions() -> dict[str, str]:
    """Torch's version and, on a GPU, eight digits of each kernel's sources: an engine is measured beside them."""
    import torch

    from ... import kernels

    folder = Path(kernels.__file__).parent
    versions = {"torch": str(torch.__version__)}
    for source in sorted(folder.glob("*_triton.py")) if this_device().capability else ():
        name = source.stem.removesuffix("_triton")
        pair = [file for file in (folder / f"{name}.py", source) if file.is_file()]
        versions[name] = hashlib.sha256(b"".join(file.read_bytes() for file in pair)).hexdigest()[:8]
    return versions


def _driver(device: Device) -> str:
    return f"NVIDIA driver {device.driver or 'none'} at compute capability {device.capability or 'none'}"
