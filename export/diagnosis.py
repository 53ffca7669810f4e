"""Where a refused engine goes wrong: the first value inside a graph that differs from torch's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..runtime.engines import Arrays
from .graph import Graph

THRESHOLDS = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference that passes, in units of the value's largest magnitude: some twenty times what rounding costs."""


def first_difference(graph: Graph, run: Callable[[Any], Arrays], precision: str) -> str | None:
    """Name the first operator whose result differs, and the module it belongs to; None if none does.

    Args:
        graph: translated from torch, before the target took it.
        run: builds an `onnx.ModelProto` for the target and runs it on the graph's example.
        precision: a key of `THRESHOLDS`.
    """
    from onnx import ModelProto, helper

    expected = _Recorder(graph.program.module()).record(*graph.example.values())
    probe = ModelProto()
    probe.CopyFrom(graph.model)
    outputs = {value.name for value in probe.graph.output}
    names = [name for node in probe.graph.node for name in node.output if name in expected and name not in outputs]
    probe.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    found = run(probe)
    for name in names:
        value, module = expected[name]
        error = np.abs(found[name] - value).max() if found[name].shape == value.shape else 0.0
        if not error <= THRESHOLDS[precision] * np.abs(value).max():
            return f"{name} in {module or 'the graph'}"
    return None


class _Recorder(fx.Interpreter):
    """Runs a program and keeps every float result with the path of its module."""

    def record(self, *inputs: Tensor) -> dict[str, tuple[Any, str]]:
        self.values: dict[str, tuple[Any, str]] = {}
        with torch.inference_mode():
            self.run(*inputs)
        return self.values

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.dtype == torch.float32 and node.op == "call_function":
            modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            self.values[node.name] = (result.numpy(), modules[-1] if modules else "")
        return result
