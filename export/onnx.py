"""The ONNX target: the graph as it is, in float32, for ONNX Runtime and whatever else reads ONNX."""

from pathlib import Path
from typing import Any

from ..runtime.engines.onnx import SUFFIX


def precisions() -> tuple[str, ...]:
    """What this target is built in, the default first."""
    return ("fp32",)


def write(graph: Any, folder: Path, name: str, precision: str) -> None:
    """Write the file that the onnx engine loads.

    Args:
        graph: an `onnx.ModelProto`.
        folder: where to.
        name: of the file, without its suffix.
        precision: one of `precisions()`.
    """
    import onnx

    onnx.save(graph, folder / f"{name}{SUFFIX}")
