"""Engines beside a student as an export leaves them, but for graphs that nothing can run: made in no time."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewstep.runtime.artefact import read_card
from fewstep.runtime.engines import engine_module
from fewstep.runtime.engines.device import Device, this_device
from fewstep.runtime.engines.manifest import FORMAT, Manifest, kernel_versions, write_manifest

GRAPH, REPORT = "trajectory.onnx", "parity.json"


def make_manifest(directory: Path, **changed: Any) -> Manifest:
    """A manifest that holds here for a student of one step, but for what is changed."""
    values = {
        "format": FORMAT,
        "target": "onnx",
        "precision": "fp32",
        "steps": 1,
        "built_from": read_card(directory).engine_key(changed.get("steps", 1)),
        "graphs": {"trajectory": "0" * 64},
        "shapes": {"trajectory": {"noise": ["batch", 1, 4, 4, 4], "pixels": ["batch", 8, 8, 3]}},
        "sensitive": {},
        "kernels": kernel_versions(),
        "library": engine_module("onnx").library(),
        "device": this_device(),
        "files": {},
        "milliseconds": {"engine": 1.0, "torch": 2.0},
        "report": REPORT,
    }
    return Manifest(**{**values, **changed})


def store_engine(directory: Path, graph: bytes = b"graph", used: float | None = None, **changed: Any) -> Path:
    """Put an engine beside a student.

    Args:
        directory: the student's.
        graph: what its files hold.
        used: when it last was, in seconds since 1970; None for now.
        changed: in the manifest, which stays true to its folder's name.
    """
    files = {name: hashlib.sha256(graph).hexdigest() for name in (GRAPH, REPORT)}
    manifest = make_manifest(directory, **{"files": files, **changed})
    folder = directory / "engines" / manifest.folder_name
    folder.mkdir(parents=True)
    for name in (GRAPH, REPORT):
        (folder / name).write_bytes(graph)
    write_manifest(folder, manifest)
    if used is not None:
        os.utime(folder / "manifest.json", (used, used))
    return folder


def change_manifest(folder: Path, **values: Any) -> Path:
    """Write other values into an engine's manifest, and rename its folder to what they give; where it is then."""
    path = folder / "manifest.json"
    raw = {**json.loads(path.read_text(encoding="utf-8")), **values}
    manifest = Manifest(**{**raw, "device": Device(**raw["device"])})
    path.unlink()  # it may be a hard link
    path.write_text(json.dumps(asdict(manifest)), encoding="utf-8")
    return folder.rename(folder.with_name(manifest.folder_name))
