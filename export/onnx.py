"""The ONNX target: the graph as it is, in float32, for ONNX Runtime and whatever else reads ONNX; or in int8."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.engines.onnx import SUFFIX
from .int8 import write_int8


def precisions() -> tuple[str, ...]:
    """What this target is built in, the default first."""
    return ("fp32", "int8")


def write(graph: Any, folder: Path, name: str, precision: str) -> Mapping[str, int] | None:
    """Write the file that the onnx engine loads.

    Args:
        graph: an `onnx.ModelProto`.
        folder: where to.
        name: of the file, without its suffix.
        precision: one of `precisions()`.

    Returns:
        What int8 leaves in float32, by rule.
    """
    import onnx

    path = folder / f"{name}{SUFFIX}"
    if precision == "int8":
        return write_int8(graph, path)
    onnx.save(graph, path)
    return None
