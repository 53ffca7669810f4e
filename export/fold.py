"""Constant folding that reaches through the batch size.

A trajectory's times are constants, but every network call first spreads its time over the batch. Exporters and engines
then compute the time embedding, and all modulations made of it, at run time, and in bf16 lose most of the digits of the
time: images differed five times as much. Computed here once, in float32 for one image, they are constants that
broadcast.
"""

from typing import Any

from .nodes import inlined, spreading

_BROADCASTING = {"Add", "Sub", "Mul", "Div"}


def fold_constants(model: Any) -> Any:
    """Replace what does not depend on the inputs' values by constants, and drop what nothing uses.

    A value that depends on the inputs' batch size alone is computed for batch 1, and replaced only where it meets the
    batch in an elementwise operator or a kernel that broadcasts it; the parity check compares several batch sizes.

    Args:
        model: an `onnx.ModelProto` without subgraphs; changed in place.

    Returns:
        The model.
    """
    from onnx import numpy_helper

    graph = model.graph
    fixed, per_image = _known_values(graph)
    remaining = [node for node in graph.node if node.output[0] not in per_image]
    spread = spreading(model)

    def folds(node: Any, place: int) -> bool:
        broadcasts = node.op_type in _BROADCASTING or (node.op_type, place) in spread
        return node.input[place] in fixed or (node.input[place] in per_image and broadcasts)

    wanted = {name for node in remaining for place, name in enumerate(node.input) if folds(node, place)}
    wanted -= {"", *(tensor.name for tensor in graph.initializer)}
    stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    constants: dict[str, str] = {}
    for name, value in _evaluate(model, sorted(wanted), per_image).items():
        if name not in fixed and value.dtype.kind != "f":
            continue  # a size computed from the batch, not a value spread over it
        # Every step has its own copy of a transposed weight: one is enough.
        constants[name] = stored.setdefault((str(value.dtype), value.shape, value.tobytes()), f"{name}_folded")
        if constants[name] == f"{name}_folded":
            graph.initializer.append(numpy_helper.from_array(value, constants[name]))
    for node in remaining:
        for position, name in enumerate(node.input):
            if name in constants and folds(node, position):
                node.input[position] = constants[name]
    drop_unused(graph)
    called = {(node.domain, node.op_type) for node in graph.node}
    functions = [function for function in model.functions if (function.domain, function.name) in called]
    del model.functions[:]
    model.functions.extend(functions)
    return model


def _known_values(graph: Any) -> tuple[set[str], set[str]]:
    """Names of the values that depend on no input at all, and of those that depend at most on the inputs' shapes."""
    inputs = {value.name for value in graph.input}
    fixed = {"", *(tensor.name for tensor in graph.initializer)}
    per_image = set(fixed)
    for node in graph.node:
        if fixed.issuperset(node.input):
            fixed.update(node.output)
        if per_image.issuperset(node.input) or (node.op_type == "Shape" and node.input[0] in inputs):
            per_image.update(node.output)
    return fixed, per_image


def _evaluate(model: Any, names: list[str], known: set[str]) -> dict[str, Any]:
    """The named values for batch 1, by ONNX's reference implementation."""
    import numpy as np
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    nodes = [node for node in graph.node if node.output[0] in known]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names]
    part = helper.make_graph(nodes, "constants", list(graph.input), outputs, list(graph.initializer))
    program = helper.make_model(
        part, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
    inputs = {
        value.name: np.zeros(
            [dimension.dim_value or 1 for dimension in value.type.tensor_type.shape.dim],
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
        )
        for value in graph.input
    }
    return dict(zip(names, ReferenceEvaluator(inlined(program)).run(names, inputs), strict=True))


def drop_unused(graph: Any) -> None:
    """Remove unused nodes and initializers, and the exporter's notes on the rest, which name files of this machine."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    del graph.node[:], graph.value_info[:], graph.metadata_props[:]
    graph.node.extend(reversed(kept))
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in used:
            del graph.initializer[place]  # in place: protobuf keeps what was copied for as long as the model
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
