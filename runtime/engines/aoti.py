"""AOTInductor: the graph compiled by torch ahead of time into code for this processor; nothing is traced at run time.

A package is a program: it may do whatever this process may. It is loaded only after its manifest vouched for every byte
of it, and made on the machine that runs it, never taken from elsewhere.
"""

import json
from pathlib import Path
from threading import Lock
from typing import Any

import numpy.typing as npt
import torch

from . import Arrays, Engine

SUFFIX = ".pt2"
INPUTS, OUTPUTS = "inputs", "outputs"
"""Keys of a package's metadata: the names of what the program takes and gives, in its order, as JSON."""


class AotiEngine:
    """A compiled program.

    Args:
        path: the package, which the caller has checked.
    """

    def __init__(self, path: Path) -> None:
        from torch._inductor import aoti_load_package

        self._program: Any = aoti_load_package(str(path))
        metadata = self._program.get_metadata()
        self._inputs, self._outputs = json.loads(metadata[INPUTS]), json.loads(metadata[OUTPUTS])
        self._device, self._lock = torch.device(metadata["AOTI_DEVICE_KEY"]), Lock()

    @torch.inference_mode()
    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the program; one call at a time, since each takes all threads."""
        tensors = [torch.tensor(arrays[name], device=self._device) for name in self._inputs]
        with self._lock:
            results = self._program(*tensors)
        return {name: result.cpu().numpy() for name, result in zip(self._outputs, results, strict=True)}


def load(folder: Path, graph: str, precision: str) -> Engine:
    """Load one graph of an export; the file itself holds the precision."""
    return AotiEngine(folder / f"{graph}{SUFFIX}")


def library() -> str:
    """Torch's version, and the instructions that it compiles for; with a GPU, its compute capability too."""
    built_for = [torch.backends.cpu.get_cpu_capability()]
    if torch.cuda.is_available():
        built_for.append("sm_{}{}".format(*torch.cuda.get_device_capability()))
    return " ".join(("torch", str(torch.__version__), *built_for))
