"""An ONNX graph whose matrix products take operands in eight-bit floats, for GPUs that multiply those."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..runtime.engines import Arrays
from ..runtime.errors import require
from .calibration import require_samples
from .int8 import PRODUCTS, kept_products, with_names

LARGEST = 448.0
"""The largest number of float8 E4M3FN."""
_SMALLEST = 1e-3
"""What a scale is made of at least, so that float16 can hold it."""


def quantise(model: Any, samples: Sequence[Arrays]) -> tuple[Any, dict[str, int]]:
    """Round the operands of products with weights to float8: to one scale for each weight and each activation.

    What is between products stays float32, as do those that `int8.kept_products` names; `precision.to_half` may follow.

    Args:
        model: an `onnx.ModelProto` of opset 19 or later without functions or subgraphs.
        samples: inputs of single images, which show how large activations become.

    Returns:
        The graph, and how many products each rule keeps.

    Raises:
        FewstepError: there are no samples, and products to scale by them.
    """
    copy = with_names(model)
    kept = kept_products(copy.graph)
    excluded = set().union(*kept.values())
    if any(node.op_type in PRODUCTS and node.name not in excluded for node in copy.graph.node):
        require_samples(samples)
    constants = {tensor.name for tensor in copy.graph.initializer}
    products = [
        node
        for node in copy.graph.node
        if node.op_type in PRODUCTS and node.name not in excluded and node.input[1] in constants
    ]
    largest = _largest(copy, sorted({node.input[0] for node in products} - constants), samples) if products else {}
    rounding = _Rounding(copy.graph)
    for node in products:
        node.input[1] = rounding.weight(node.input[1])
        if node.input[0] in largest:
            node.input[0] = rounding.activation(node.input[0], largest[node.input[0]])
    rounding.store()
    return copy, {rule: len(names) for rule, names in kept.items()}


def _largest(model: Any, names: Sequence[str], samples: Sequence[Arrays]) -> dict[str, float]:
    """The largest magnitude that each value has on the samples."""
    from onnx import ModelProto, TensorProto, helper

    runtime = require("onnxruntime", "onnx")
    watched = ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in set(names) - {value.name for value in model.graph.input}
    )
    session = runtime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    computed = [value.name for value in session.get_outputs() if value.name in names]
    largest = dict.fromkeys(names, 0.0)
    for sample in samples:
        values = {**sample, **dict(zip(computed, session.run(computed, sample), strict=True))}
        largest = {name: max(most, float(np.abs(values[name]).max())) for name, most in largest.items()}
    return largest


class _Rounding:
    """The nodes of a graph, with those before them that round an operand; each value is rounded once."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.new, self.done = graph, dict[str, list[Any]](), dict[str, str]()
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.zero = self._constant("float8_zero", np.zeros((), np.float32), float8=True)

    def weight(self, name: str) -> str:
        """The name of a weight that is stored in float8."""
        from onnx import numpy_helper

        if name not in self.done:
            array = numpy_helper.to_array(self.tensors[name])
            scale = max(float(np.abs(array).max()), _SMALLEST) / LARGEST
            small = self._constant(f"{name}_float8", array / scale, float8=True)
            self._dequantise(name, small, scale)
        return self.done[name]

    def activation(self, name: str, largest: float) -> str:
        """The name of a value that passes through float8."""
        from onnx import helper

        if name not in self.done:
            scale = max(largest, _SMALLEST) / LARGEST
            self._constant(f"{name}_scale", np.float32(scale))
            small = f"{name}_float8"
            node = helper.make_node("QuantizeLinear", [name, f"{name}_scale", self.zero], [small])
            self.new.setdefault(name, []).append(node)
            self._dequantise(name, small, scale)
        return self.done[name]

    def store(self) -> None:
        """Put the new nodes behind what they round, and drop weights that nothing uses any more."""
        first = {*self.tensors, *(value.name for value in self.graph.input)}
        nodes = [node for name in self.new if name in first for node in self.new[name]]
        for node in self.graph.node:
            nodes += [node, *(each for name in node.output for each in self.new.get(name, ()))]
        used = {name for node in nodes for name in node.input}
        tensors = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(tensors)

    def _dequantise(self, name: str, small: str, scale: float) -> None:
        from onnx import helper

        self._constant(f"{name}_scale", np.float32(scale))
        self.done[name] = f"{name}_rounded"
        node = helper.make_node("DequantizeLinear", [small, f"{name}_scale", self.zero], [self.done[name]])
        self.new.setdefault(name, []).append(node)

    def _constant(self, name: str, array: Any, float8: bool = False) -> str:
        from onnx import TensorProto, helper, numpy_helper

        if name not in self.tensors:
            array = np.asarray(array)
            if float8:
                array = array.astype(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
            self.graph.initializer.append(numpy_helper.from_array(array, name))
            self.tensors[name] = self.graph.initializer[-1]
        return name
