"""OpenVINO on the CPU: the fastest engine there, in bfloat16 where the CPU has it."""

from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy.typing as npt
import torch

from ..errors import require
from . import Arrays, Engine

SUFFIX = ".xml"
_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """An OpenVINO graph, compiled for one image, and for any batch when first needed.

    With its batch fixed, one image takes a fifth less time: shapes are known, and buffers planned, beforehand.

    Args:
        path: the graph's `.xml` file.
        precision: of the arithmetic, `fp32` or `bf16`; the weights are stored apart from it.
    """

    def __init__(self, path: Path, precision: str) -> None:
        self._core = require("openvino", "openvino").Core()
        self._model, self._precision = self._core.read_model(path), precision
        self._one_image = self._compile(batch=1)
        self._lock = Lock()

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the graph; one call at a time, since each takes all threads."""
        with self._lock:
            request = self._one_image if len(next(iter(arrays.values()))) == 1 else self._any_batch
            # The results are copied, because the next call writes over the request's memory; the inputs need not be.
            results = request.infer(arrays, share_inputs=True, share_outputs=False)
            # By position: compiling gives an output the names of all that was fused into it.
            return {name: results[index] for index, value in enumerate(self._model.outputs) for name in value.names}

    @cached_property
    def _any_batch(self) -> Any:
        return self._compile(batch=-1)

    def _compile(self, batch: int) -> Any:
        model = self._model.clone()
        model.reshape({value.any_name: [batch, *list(value.partial_shape)[1:]] for value in model.inputs})
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[self._precision],
            # As many as torch takes, so that one setting (OMP_NUM_THREADS, an affinity mask) holds for every engine.
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return self._core.compile_model(model, "CPU", properties).create_infer_request()


def load(folder: Path, graph: str, precision: str) -> Engine:
    """Load one graph of an export."""
    return OpenVinoEngine(folder / f"{graph}{SUFFIX}", precision)


def library() -> str:
    """OpenVINO's version."""
    return f"openvino {require('openvino', 'openvino').__version__}"


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16."""
    core = require("openvino", "openvino").Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
