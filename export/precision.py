"""An ONNX graph in half precision, except where that costs accuracy: five rules say where.

A rule looks at operators and at how values flow from `noise` to the result, never at what a layer is called, so that it
holds for any network.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

LAYERS = {"MatMul", "Gemm", "Conv", "ConvTranspose"}
"""What multiplies by weights, where one operand is constant."""
NORMALISATIONS = {"LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization"}
STATISTICS = {"ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "Pow", "Sqrt", "Reciprocal", "Exp", "Log"}
"""What a normalisation written out consists of, together with the arithmetic on their results."""
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
_LARGEST_CHANGE = 0.01
"""Relative; rounding changes a number by 0.004 at most, so more is a number too small or too large for the type."""


def to_half(model: Any, precision: str) -> dict[str, int]:
    """Convert a float32 graph, whose inputs and outputs keep their types.

    Args:
        model: an `onnx.ModelProto` without functions or subgraphs; changed in place.
        precision: `fp16` or `bf16`.

    Returns:
        How many operators each rule keeps in float32; see `sensitive`.
    """
    from onnx import TensorProto

    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    kept = sensitive(model.graph, half)
    _convert(model, half, precision, set().union(*kept.values()))
    return {rule: len(names) for rule, names in kept.items() if names}


def sensitive(graph: Any, half: int) -> dict[str, set[str]]:
    """Find the operators that stay in float32, by rule; each is named by its first output.

    - statistics: normalisations, their parts, and divisions by what was computed (linear attention).
    - constants: operators with a scalar that the half type cannot hold, such as 1e-15 in fp16.
    - time embedding: sines and cosines, and all that leads to them.
    - sampler: the arithmetic on noise and x_t, up to the networks' first layers.
    - last projections: the layers that feed the sampler or the result, and what lies between.

    Args:
        graph: an `onnx.GraphProto`, whose first output is its result.
        half: its type afterwards, as ONNX numbers types.
    """
    flow = _Flow(graph)
    sampler = {node.output[0] for node in flow.sampler()}
    ends = [name for node in flow.sampler() for name in node.input if name not in sampler]
    ends.append(graph.output[0].name)  # others are there to be looked at, and change nothing
    return {
        "statistics": {node.output[0] for node in graph.node if flow.is_statistic(node)},
        "constants": {node.output[0] for node in graph.node if flow.has_lost_scalar(node, half)},
        "time embedding": flow.time_embedding(),
        "sampler": sampler,
        "last projections": {node.output[0] for name in ends for node in flow.projection(name)},
    }


class _Flow:
    """A graph that is walked from value to value."""

    def __init__(self, graph: Any) -> None:
        self.nodes = graph.node
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}

    def computed(self, node: Any) -> list[str]:
        """The operands that are not constants."""
        return [name for name in node.input if name and name not in self.constants]

    def is_layer(self, node: Any) -> bool:
        return node.op_type in LAYERS and len(self.computed(node)) < len([name for name in node.input if name])

    def is_statistic(self, node: Any) -> bool:
        if node.op_type in _ARITHMETIC:
            makers = {self.maker[name].op_type for name in node.input if name in self.maker}
            return bool(makers & STATISTICS) or (node.op_type == "Div" and node.input[1] not in self.constants)
        return node.op_type in NORMALISATIONS | STATISTICS

    def has_lost_scalar(self, node: Any, half: int) -> bool:
        from onnx import TensorProto

        tensors = [self.constants[name] for name in node.input if name in self.constants]
        scalars = [tensor for tensor in tensors if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) == 1]
        return any(_is_lost(tensor, half) for tensor in scalars)

    def time_embedding(self) -> set[str]:
        found = {node.output[0] for node in self.nodes if node.op_type in ("Sin", "Cos")}
        for node in reversed(self.nodes):
            if node.output[0] in found:
                found |= {self.maker[name].output[0] for name in node.input if name in self.maker}
        return found

    def sampler(self) -> list[Any]:
        reached, found = {"noise"}, []
        for node in self.nodes:
            if node.op_type in _ARITHMETIC | {"Gather"} and reached.intersection(node.input):
                reached.update(node.output)
                found.append(node)
        return found

    def projection(self, name: str) -> list[Any]:
        """The nodes from a layer to a value, each of one computed operand; none if no layer lies there."""
        chain: list[Any] = []
        while name in self.maker:
            node = self.maker[name]
            chain.append(node)
            if self.is_layer(node):
                return chain
            operands = self.computed(node)
            if len(operands) != 1:
                break
            name = operands[0]
        return []


def _is_lost(tensor: Any, half: int) -> bool:
    from onnx import numpy_helper

    value = numpy_helper.to_array(tensor).astype(np.float64)
    with np.errstate(over="ignore"):
        rounded = numpy_helper.to_array(_in_type(tensor, half, tensor.name)).astype(np.float64)
        return bool((np.abs(rounded - value) > _LARGEST_CHANGE * np.abs(value)).any())


def _in_type(tensor: Any, kind: int, name: str) -> Any:
    from onnx import helper, numpy_helper

    with np.errstate(over="ignore"):
        array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(array, name)


def _convert(model: Any, half: int, precision: str, in_float32: set[str]) -> None:
    """Give each node the type it computes in, and its operands in that type."""
    from onnx import TensorProto

    graph, single = model.graph, TensorProto.FLOAT
    version = next(each.version for each in model.opset_import if not each.domain)
    casts = _Casts(graph, {half: precision, single: "fp32"})
    for node in list(graph.node):
        kind = single if node.output[0] in in_float32 else half
        bound = set()  # those of the schema's type variables that stand for a float type here
        for position, variable in _variables(node, node.input, version):
            if node.input[position] in casts.types:
                bound.add(variable)
                node.input[position] = casts.get(node.input[position], single if _is_type(variable) else kind)
        if node.op_type == "Cast" and node.attribute[0].i == single:
            node.attribute[0].i = kind
            bound.add("T2")
        casts.nodes.append(node)
        for position, variable in _variables(node, node.output, version):
            if variable in bound or variable == "tensor(float)":
                casts.put(node, position, single if _is_type(variable) else kind)
    casts.store()


def _variables(node: Any, names: Any, version: int) -> Iterator[tuple[int, str]]:
    """Position of each input or output, and its type in the operator's schema: a variable such as `T`, or a type."""
    from onnx import defs

    schema = defs.get_schema(node.op_type, version, node.domain)
    formal = schema.inputs if names is node.input else schema.outputs
    for position in range(len(names)):
        yield position, formal[min(position, len(formal) - 1)].type_str


def _is_type(variable: str) -> bool:
    return variable.startswith("tensor(")


class _Casts:
    """The nodes of the converted graph, and every float value in the types that somebody asks for, cast once each."""

    def __init__(self, graph: Any, suffixes: Mapping[int, str]) -> None:
        from onnx import TensorProto

        self.graph, self.suffixes, self.single = graph, suffixes, TensorProto.FLOAT
        self.nodes: list[Any] = []
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        types |= {name: tensor.data_type for name, tensor in self.constants.items()}
        self.types = {name: kind for name, kind in types.items() if kind == self.single}

    def get(self, name: str, kind: int) -> str:
        """The name of a value in a type."""
        alias = name if self.types[name] == kind else f"{name}_{self.suffixes[kind]}"
        if alias not in self.types:
            if name in self.constants:
                self.constants[alias] = _in_type(self.constants[name], kind, alias)
            else:
                self._cast(name, alias, kind)
            self.types[alias] = kind
        return alias

    def put(self, node: Any, position: int, kind: int) -> None:
        """Note the type of a node's result; those of the graph are float32, under the names that they had."""
        name = node.output[position]
        if name in self.outputs and kind != self.single:
            node.output[position] = f"{name}_{self.suffixes[kind]}"
            self.types[node.output[position]] = kind
            self._cast(node.output[position], name, self.single)
            kind = self.single
        self.types[name] = kind

    def store(self) -> None:
        used = {name for node in self.nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in used)

    def _cast(self, name: str, alias: str, kind: int) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Cast", [name], [alias], to=kind))
