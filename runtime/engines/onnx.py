"""ONNX Runtime: portable, float32; on a GPU where `onnxruntime-gpu` is installed."""

from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from ..errors import FewstepError, require
from . import Arrays, Engine

SUFFIX = ".onnx"


class OnnxEngine:
    """An ONNX graph in an `InferenceSession`.

    Args:
        path: the graph's file.

    Raises:
        FewstepError: ONNX Runtime is missing, or it cannot use the GPU that it has been built for.
    """

    def __init__(self, path: Path) -> None:
        runtime: Any = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        # As many as torch takes, so that one setting holds for every engine.
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads would otherwise spin for the next call, and take the cores from whoever else serves.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(path, options, providers=_providers())
        _require_provider(self.session)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the graph."""
        return dict(zip(self.outputs, self.session.run(self.outputs, arrays), strict=True))


def load(folder: Path, graph: str, precision: str) -> Engine:
    """Load one graph of an export; the file itself holds the precision."""
    return OnnxEngine(folder / f"{graph}{SUFFIX}")


def library() -> str:
    """ONNX Runtime's version and execution provider."""
    return f"onnxruntime {require('onnxruntime', 'onnx').__version__} {_providers()[0]}"


def _require_provider(session: Any) -> None:
    """ONNX Runtime falls back to the CPU in silence, and what was measured and named would be something else."""
    wanted, found = _providers()[0], session.get_providers()[0]
    if found != wanted:
        raise FewstepError(
            f"ONNX Runtime offers {wanted} and runs on {found}: install the CUDA libraries and the driver that "
            "onnxruntime-gpu needs, or onnxruntime in its place"
        )


def _providers() -> list[str]:
    available = require("onnxruntime", "onnx").get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
