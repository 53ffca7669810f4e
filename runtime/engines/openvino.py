"""OpenVINO on the CPU: the fastest engine there, in bfloat16 where the CPU has it."""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy.typing as npt
import torch

from ..errors import require
from . import Arrays, Engine

SUFFIX = ".xml"
MOST_SHAPES = 16
"""Sizes of batches and images that a graph is kept compiled for."""
SMALL = 256 * 2**20
"""Bytes of weights. Each shape has its own arrangement of them, which a large graph can afford for one image only."""
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoEngine:
    """An OpenVINO graph, compiled for each batch that it meets; a large graph for one image, and once for all others.

    With its batch fixed, a call takes a sixth less time: shapes are known, and buffers planned, beforehand. The first
    call of a batch size takes longer by its compilation, about a second for the built-in student.

    Args:
        path: the graph's `.xml` file.
        precision: `fp32`; all others compute in bfloat16 where the CPU does, whatever their weights are stored in.
    """

    def __init__(self, path: Path, precision: str) -> None:
        self._core = openvino().Core()
        self._model, self._precision = self._core.read_model(path), precision
        self._small = path.with_suffix(".bin").stat().st_size <= SMALL
        self._compiled: OrderedDict[Shapes, Any] = OrderedDict()
        self._threads, self._lock = torch.get_num_threads(), Lock()
        shapes = tuple((value.any_name, _with_batch(value.partial_shape, 1)) for value in self._model.inputs)
        if -1 not in chain(*(shape for _, shape in shapes)):
            self._for_shapes(shapes)

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the graph; one call at a time, since each takes all threads."""
        with self._lock:
            request = self._request(arrays)
            # The results are copied, because the next call writes over the request's memory; the inputs need not be.
            results = request.infer(arrays, share_inputs=True, share_outputs=False)
            # By position: compiling gives an output the names of all that was fused into it.
            return {name: results[index] for index, value in enumerate(self._model.outputs) for name in value.names}

    def _request(self, arrays: Arrays) -> Any:
        shapes = tuple((value.any_name, arrays[value.any_name].shape) for value in self._model.inputs)
        return self._for_shapes(shapes) if self._small or shapes[0][1][0] == 1 else self._any_batch

    def _for_shapes(self, shapes: Shapes) -> Any:
        if shapes not in self._compiled:
            if len(self._compiled) >= MOST_SHAPES:
                self._compiled.popitem(last=False)
            self._compiled[shapes] = self._compile(shapes)
        self._compiled.move_to_end(shapes)
        return self._compiled[shapes]

    @cached_property
    def _any_batch(self) -> Any:
        return self._compile((value.any_name, _with_batch(value.partial_shape, -1)) for value in self._model.inputs)

    def _compile(self, shapes: Iterable[tuple[str, Sequence[int]]]) -> Any:
        model = self._model.clone()
        model.reshape({name: list(shape) for name, shape in shapes})
        return self._core.compile_model(model, "CPU", properties(self._precision, self._threads)).create_infer_request()


def properties(precision: str, threads: int) -> dict[str, Any]:
    """What OpenVINO is told when it compiles a graph; as many threads as torch took: one setting for every engine."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" or not has_bf16() else "bf16",
        "INFERENCE_NUM_THREADS": threads,
        # Every process would pin its threads to the first cores: two servers' workers shared one, and drew half.
        "ENABLE_CPU_PINNING": False,
    }


def _with_batch(shape: Any, batch: int) -> tuple[int, ...]:
    """A shape with this batch, and -1 for what else is dynamic; some inputs have no dimensions at all."""
    sizes = tuple(-1 if size.is_dynamic else size.get_length() for size in shape)
    return (batch, *sizes[1:]) if sizes else ()


def load(folder: Path, graph: str, precision: str) -> Engine:
    """Load one graph of an export."""
    return OpenVinoEngine(folder / f"{graph}{SUFFIX}", precision)


def openvino() -> Any:
    """The library; `FewstepError` if it is missing.

    Its converter reports every use to its makers through a package of its own, and does not where that is missing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return require("openvino", "openvino")


def library() -> str:
    """OpenVINO's version."""
    return f"openvino {openvino().__version__}"


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16."""
    core = openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
