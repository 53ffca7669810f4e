"""Who is compared in `fewstep bench --peers`: our engines, diffusers, and optimum's pipelines."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...export.export import TARGETS, check_request
from ...runtime.engines.device import computes_bf16
from ...runtime.engines.manifest import PARTS
from ...runtime.errors import FewstepError
from .engine_table import available
from .environments import REQUIRED, python_of
from .own_worker import BARE, HALF
from .subjects import Subject
from .worker import OURS

PEER_WORKER = Path(__file__).with_name("peer_worker.py")
PRECISIONS = ("fp32", "bf16")
"""Those that are compared: what draws other pictures, such as int8, is no other way to do the same work."""
REFERENCE = "diffusers fp32"
"""Whose pictures are the ones to draw."""
SAME_LIBRARY = {"diffusers": "torch", "optimum-onnx": "onnx", "optimum-intel": "openvino"}
"""Which engine of ours each peer is set beside."""


@dataclass(frozen=True)
class Contender:
    """One way to draw.

    Args:
        name: for the table.
        ours: the engine of ours that it is set beside: itself, or the one of the same library and precision.
        job: what its process opens; see `peer_worker`.
        program: starts its process; None if its environment is not installed.
        installation: the command that installs it.
        exported: file that says how long its export took, and appears when that is done; None if it needs none.
        environment: variables of its process.
    """

    name: str
    ours: str
    job: Mapping[str, Any]
    program: Sequence[str | Path] | None = OURS
    installation: str = ""
    exported: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def called(self, name: str) -> "Contender":
        """The same under another name."""
        return replace(self, name=name)


def our_contenders(model: Path, folder: Path, bare: bool) -> list[Contender]:
    """Torch, every target that can be built here, and the bare loop over what OpenVINO was given.

    Args:
        model: the student, beside which engines are exported.
        folder: for notes of what was exported.
        bare: whether the loop takes part.
    """
    ready, listed = {name.removesuffix(PARTS) for name in available(model)}, []
    for name in _our_names():
        exported = None if name.startswith("torch") else folder / f"{slug(name)}.exported.json"
        if exported and name not in ready:
            exported.unlink(missing_ok=True)  # of another version of its library
        listed.append(Contender(name, name, _our_job(model, name), exported=exported))
    loops = [contender.name for contender in listed if bare and contender.name.startswith("openvino")]
    return listed + [Contender(BARE + name, name, _our_job(model, BARE + name)) for name in loops]


def peer_contenders(
    subject: Subject, model: Path, inputs: Path, environments: Path, threads: int
) -> Iterator[Contender]:
    """diffusers, eager and compiled, by this Python; optimum's, each by the Python of its environment."""
    shared = {"export": False, "model": str(model), "inputs": str(inputs), "threads": threads}
    shared |= {"inputs_hold_text": subject.holds_text}
    for peer, compiled in (("diffusers", False), ("diffusers", True), *((name, False) for name in REQUIRED)):
        for precision in PRECISIONS if computes_bf16() and peer != "optimum-onnx" else PRECISIONS[:1]:
            name = f"{peer} {'compiled ' if compiled else ''}{precision}"
            python = python_of(environments, peer) if peer in REQUIRED else sys.executable
            folder = inputs.parent / peer
            yield Contender(
                name,
                _same(peer, precision),
                {**shared, "peer": peer, "precision": precision, "compiled": compiled, "exported": str(folder)},
                [python, "-P", PEER_WORKER] if python else None,
                f"python -m fewstep.app.bench.environments {environments} {peer}",
                folder / "exported.json" if peer in REQUIRED else None,
                # Nothing from the hub; and compilation counts in the first call, whatever earlier runs have left.
                {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
            )


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _our_names() -> Iterator[str]:
    yield "torch"
    if computes_bf16():
        yield HALF
    for target in TARGETS:
        try:
            check_request(target)
        except FewstepError:
            continue  # its library is not installed
        possible = TARGETS[target].precisions()
        yield from (f"{target}-{precision}" for precision in PRECISIONS if precision in possible)


def _our_job(model: Path, engine: str) -> dict[str, Any]:
    return {"export": False, "model": str(model), "engine": engine}


def _same(peer: str, precision: str) -> str:
    target = SAME_LIBRARY[peer]
    return {"torch-fp32": "torch", "torch-bf16": HALF}.get(f"{target}-{precision}", f"{target}-{precision}")
