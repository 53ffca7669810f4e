"""The ONNX target: the graph as it is, in float32, for ONNX Runtime and whatever else reads ONNX; or in few bits."""

from collections.abc import Mapping
from pathlib import Path

from ..runtime.engines import PRECISIONS
from ..runtime.engines.onnx import SUFFIX
from .graph import Graph
from .int8 import write_int8, write_static_int8
from .large import save
from .weight_only import BITS, write_onnx


def precisions() -> tuple[str, ...]:
    """What this target is built in, the default first."""
    return PRECISIONS["onnx"]


def write(graph: Graph, folder: Path, name: str, precision: str) -> Mapping[str, int] | None:
    """Write the file that the onnx engine loads.

    Args:
        graph: what to write.
        folder: where to.
        name: of the file, without its suffix.
        precision: one of `precisions()`.

    Returns:
        What few bits leave in float32, by rule.
    """
    path = folder / f"{name}{SUFFIX}"
    if precision == "int8":
        return write_int8(graph.model, path)
    if precision == "int8static":
        return write_static_int8(graph.model, path, graph.samples())
    if precision in BITS:
        return write_onnx(graph.model, path, precision)
    save(graph.model, path)
    return None
