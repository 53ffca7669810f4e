"""Where a refused engine goes wrong: the first value inside a graph that differs from torch's, found by bisection."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from ..runtime.engines import Arrays
from .fold import drop_unused
from .graph import Graph

THRESHOLDS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.3, "int8static": 0.3, "fp8": 0.3, "w8": 0.1, "w4": 0.5}
"""Largest difference that passes, in units of the value's largest magnitude: some twenty times what rounding costs."""


LONGEST = 300.0
"""Seconds after which no further part is built: where that takes minutes, a stretch of the graph is named."""


def first_difference(
    graph: Graph,
    run: Callable[[Graph], Arrays],
    inputs: Mapping[str, Tensor],
    precision: str,
    longest: float = LONGEST,
) -> str:
    """Name the first value that differs, its operator and the module it belongs to.

    A graph of n values is run about log2(n) times, each time up to another cut: the values known by then that are
    needed later. Where one cut agrees and the next, which holds one value more, does not, that value is computed
    wrongly from right ones.

    Args:
        graph: translated from torch, before the target took it.
        run: builds a part of the graph for the target and runs it on those of `inputs` that it has; may raise whatever
            it likes, which counts as a difference.
        inputs: of one batch size, in the order of the program's.
        precision: a key of `THRESHOLDS`.
        longest: seconds after which no further cut is tried.

    Returns:
        Such as `conv2d_1 (Conv) in network.patch_embed`, with the first that may be meant before it where time ran out;
        empty if the whole graph agrees, or not even its beginning runs.
    """
    end = time.monotonic() + longest
    search = _Search(graph, run, tuple(inputs.values()), THRESHOLDS[precision])
    right, wrong = -1, len(search.names) - 1
    if not search.runs(0):
        return ""
    while wrong - right > 1 and time.monotonic() < end:
        middle = (right + wrong) // 2
        if search.differs(middle):
            wrong = middle
        else:
            right = middle
    if wrong == len(search.names) - 1 and not search.differs(wrong):
        return ""
    found = search.place(wrong)
    return found if wrong - right == 1 else f"one from {search.place(right + 1)} to {found}"


class _Search:
    """The values of a graph that torch knows too, in the order in which the graph computes them."""

    def __init__(
        self, graph: Graph, run: Callable[[Graph], Arrays], inputs: Sequence[Tensor], threshold: float
    ) -> None:
        self.graph, self.run, self.inputs, self.threshold = graph, run, inputs, threshold
        self.program = graph.program.module()
        self.nodes = _known_to_torch(graph)
        makers = {name: node for node in graph.model.graph.node for name in node.output if name in self.nodes}
        self.names, self.operators = list(makers), {name: node.op_type for name, node in makers.items()}
        self.last_use = _last_uses(graph.model.graph, self.names)

    def differs(self, position: int) -> bool:
        """Whether a value of the cut after this position does, or the graph up to there does not run."""
        cut = [name for name in self.names[: position + 1] if self.last_use[name] > position]
        try:
            found = self.run(_up_to(self.graph, cut))
        except Exception:  # each library raises errors of its own
            return True
        expected = _Recorder(self.program).record({self.nodes[name].name: name for name in cut}, self.inputs)
        return any(self._value_differs(found[name], expected[name]) for name in cut)

    def runs(self, position: int) -> bool:
        """Whether the graph up to a value runs."""
        try:
            self.run(_up_to(self.graph, [self.names[position]]))
        except Exception:
            return False
        return True

    def place(self, position: int) -> str:
        """The value, its operator and its module."""
        name = self.names[position]
        paths = [path for path, _ in self.nodes[name].meta.get("nn_module_stack", {}).values()]
        module = paths[-1].removeprefix("module").removeprefix(".") if paths else ""
        return f"{name} ({self.operators[name]}) in {module or 'the graph itself'}"

    def _value_differs(self, found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> bool:
        if found.size != expected.size:
            return True
        error = np.abs(found.astype(np.float64).reshape(expected.shape) - expected).max()
        one = 1.0 if expected.dtype.kind in "iu" else 0.0  # what is rounded to integers may round the other way
        return not error <= self.threshold * np.abs(expected).max() + one


class _Recorder(fx.Interpreter):
    """Runs a program and keeps the results asked for."""

    def record(self, wanted: Mapping[str, str], inputs: Sequence[Tensor]) -> Arrays:
        """The results of some nodes, each under the name that is wanted of it."""
        self.wanted, self.values = wanted, Arrays()
        with torch.inference_mode():
            self.run(*inputs)
        return self.values

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.name in self.wanted:
            self.values[self.wanted[node.name]] = result.numpy()
        return result


def _known_to_torch(graph: Graph) -> dict[str, fx.Node]:
    """Torch's node for each value of the ONNX graph that both have: floats, and what the graph gives."""
    nodes = graph.program.graph.nodes
    known = {node.name: node for node in nodes if node.op == "call_function" and _is_float(node.meta.get("val"))}
    (results,) = graph.program.graph.output_node().args
    assert isinstance(results, tuple)
    return known | dict(zip((value.name for value in graph.model.graph.output), results, strict=True))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _last_uses(graph: Any, names: Sequence[str]) -> dict[str, int]:
    """Where in `names` each of them is last needed, directly or through values not among them; outputs at the end."""
    positions = {name: position for position, name in enumerate(names)}
    last = dict.fromkeys(names, -1)
    behind: dict[str, set[str]] = {}
    for node in graph.node:
        sources = set().union(*(behind.get(name, ()) for name in node.input))
        for name in node.output:
            if name in positions:
                last.update(dict.fromkeys(sources, positions[name]))
            behind[name] = {name} if name in positions else sources
    for value in graph.output:
        last.update(dict.fromkeys(behind[value.name], len(names)))
    return last


def _up_to(graph: Graph, names: Sequence[str]) -> Graph:
    """The part of a graph that computes some of its values, without the inputs that it does not need."""
    from onnx import ModelProto, TensorProto, helper

    part = ModelProto()
    part.CopyFrom(graph.model)
    outputs = {value.name: value for value in graph.model.graph.output}
    floats = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names}
    del part.graph.output[:]
    part.graph.output.extend((floats | outputs)[name] for name in names)
    drop_unused(part.graph)
    used = {name for node in part.graph.node for name in node.input}
    for value in [value for value in part.graph.input if value.name not in used]:
        part.graph.input.remove(value)
    return replace(graph, model=part)
