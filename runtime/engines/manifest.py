"""What an export says of itself: `manifest.json` beside its graphs. An engine is loaded only if all of it holds."""

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FewstepError
from ..files import read_json, sha256_of, write_json

MANIFEST = "manifest.json"
FORMAT = 2
"""Raised whenever the exporter makes other graphs, or this file other fields, so that older exports are made again."""
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Manifest:
    """An export and what it holds for.

    Args:
        format: `FORMAT` when it was made.
        target: one of `engines.ENGINES`.
        precision: of the arithmetic, `fp32` or `bf16`.
        steps: network evaluations in the graph.
        draws: noise draws an image.
        sample_shape: (C, h, w) of one draw.
        built_from: `Card.engine_key` of the student and the steps.
        library: the engine's library, its version and what it runs on.
        processor: as `processor()` names it.
        files: SHA-256 of each graph file, by name.
        milliseconds: median time of one image, prompt to pixels, with this `engine` and with `torch`.
        parity: how the images differ from torch's.
    """

    format: int
    target: str
    precision: str
    steps: int
    draws: int
    sample_shape: tuple[int, int, int]
    built_from: str
    library: str
    processor: str
    files: Mapping[str, str]
    milliseconds: Mapping[str, float]
    parity: Mapping[str, Any]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into an export's folder."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read an export's `manifest.json`.

    Raises:
        FewstepError: it is missing, of another format, or not what `write_manifest` wrote.
    """
    raw = read_json(folder / MANIFEST)
    try:
        if raw.get("format") != FORMAT:
            raise FewstepError(f"the engine in {folder} was exported by another version of fewstep")
        channels, height, width = raw["sample_shape"]
        manifest = Manifest(**{**raw, "sample_shape": (int(channels), int(height), int(width))})
        if not all(float(manifest.milliseconds[name]) > 0 for name in ("engine", "torch")) or not manifest.files:
            raise ValueError("its times or files")
        if not folder.name.startswith(f"{manifest.target}-{manifest.precision}-{manifest.steps}step-"):
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
    if manifest.built_from != key:
        return f"the engine in {folder} was built from other weights or for other times"
    if manifest.library != library:
        return f"the engine in {folder} was built with {manifest.library}, and this is {library}"
    if manifest.processor != processor():
        return f"the engine in {folder} was built on another machine ({manifest.processor})"
    for name, digest in manifest.files.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"the engine in {folder} lacks its file {path.name}"
        if sha256_of(path) != digest:
            return f"the engine in {folder} is not what was exported: its file {path.name} changed"
    return ""


def key_of(built_from: str, library: str) -> str:
    """Eight hexadecimal digits that differ with what an engine is built from, the library and the machine."""
    return hashlib.sha256("\n".join((built_from, library, processor())).encode()).hexdigest()[:8]


@cache
def processor() -> str:
    """The CPU's name and the vector instructions that decide on an engine's kernels; the GPU, where there is one."""
    import torch

    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    parts = [name[1].strip() if name else platform.processor() or platform.machine()]
    parts += [instruction for instruction in _INSTRUCTIONS if instruction in known]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return " ".join(parts)
