"""Ways to break a graph between the exporter and its target, each made by looking at the whole graph."""

from collections.abc import Callable
from typing import Any

import numpy as np

Damage = Callable[[Any], None]
"""Changes an `onnx.ModelProto` in place; a part of one that lacks what it would change, not at all."""
Edit = Callable[[Any, Any], None]
"""Changes one node of a graph."""


def at(value: str, edit: Edit) -> Damage:
    """Edit the node that computes a value."""

    def damage(model: Any) -> None:
        for node in list(model.graph.node):
            if value in node.output:
                edit(model.graph, node)

    return damage


def constants(graph: Any) -> dict[str, Any]:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def add_constant(graph: Any, name: str, value: Any) -> str:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def put_behind(graph: Any, node: Any, *operators: tuple[str, list[str], dict[str, Any]]) -> None:
    """Send a node's result through further operators, each with its other inputs and its attributes."""
    from onnx import helper

    position, result = list(graph.node).index(node) + 1, node.output[0]
    node.output[0] = value = f"{result}_damaged"
    for number, (operator, others, attributes) in enumerate(operators, 1):
        after = result if number == len(operators) else f"{result}_damaged_{number}"
        graph.node.insert(position, helper.make_node(operator, [value, *others], [after], **attributes))
        position, value = position + 1, after


def layer_norm_as_instance_norm(model: Any) -> Damage:
    """Normalise each channel over the tokens, in place of each token over the channels."""

    def edit(graph: Any, node: Any) -> None:
        from onnx import helper

        tokens, channels = {"perm": [0, 2, 1]}, len(constants(graph)[node.input[1]])
        shift = add_constant(graph, "no_shift", np.zeros(channels, np.float32))
        first = helper.make_node("Transpose", [node.input[0]], ["channels_first"], **tokens)
        graph.node.insert(list(graph.node).index(node), first)
        weight = node.input[1]
        node.CopyFrom(helper.make_node("InstanceNormalization", ["channels_first", weight, shift], list(node.output)))
        put_behind(graph, node, ("Transpose", [], tokens))

    return at(next(node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization"), edit)


def transposed_weight(model: Any) -> Damage:
    weights = {name for name, value in constants(model.graph).items() if value.ndim == 2 and len({*value.shape}) == 1}

    def edit(graph: Any, node: Any) -> None:
        turned = constants(graph)[node.input[1]].T
        node.input[1] = add_constant(graph, "turned", np.ascontiguousarray(turned))

    return at(next(node.output[0] for node in model.graph.node if node.input[1:] and node.input[1] in weights), edit)


def wrong_scheduler_constant(model: Any) -> Damage:
    """x_0 from x_t and v with a sigma_t that is a tenth too small."""
    products = {node.output[0] for node in model.graph.node if node.op_type == "Mul"}
    difference = next(node for node in model.graph.node if node.op_type == "Sub" and products.issuperset(node.input))

    def edit(graph: Any, node: Any) -> None:
        known = constants(graph)
        (position,) = [position for position, name in enumerate(node.input) if name in known]
        node.input[position] = add_constant(graph, "sigma", np.float32(0.9) * known[node.input[position]])

    return at(difference.input[1], edit)


def overflow(model: Any) -> Damage:
    """A scale that float16 does not hold, and back."""
    from onnx import TensorProto

    def edit(graph: Any, node: Any) -> None:
        up, down = (add_constant(graph, name, np.float32(x)) for name, x in (("up", 1e6), ("down", 1e-6)))
        casts = [("Cast", list[str](), {"to": kind}) for kind in (TensorProto.FLOAT16, TensorProto.FLOAT)]
        put_behind(graph, node, ("Mul", [up], {}), *casts, ("Mul", [down], {}))

    return at(next(node.output[0] for node in model.graph.node if node.op_type == "Conv"), edit)


def batch_of_the_example(model: Any) -> Damage:
    """A shape that holds for the four images of the example only."""
    shapes = {node.output[0]: node for node in model.graph.node if node.op_type == "Concat"}
    reshape = next(node for node in model.graph.node if node.op_type == "Reshape" and node.input[1] in shapes)
    known = constants(model.graph)
    sizes = [known[name] for name in shapes[reshape.input[1]].input if name in known]

    def edit(graph: Any, node: Any) -> None:
        node.input[1] = add_constant(graph, "shape", np.concatenate([[4], *sizes]).astype(np.int64))

    return at(reshape.output[0], edit)


def first_image_for_all(model: Any) -> Damage:
    """A value of the first image that is broadcast to the batch: of a single image, it is right."""
    known = constants(model.graph)
    products = {node.output[0] for node in model.graph.node if node.op_type == "Mul" and known.keys() & set(node.input)}
    residual = next(
        node
        for node in model.graph.node
        if node.op_type == "Add" and node.input[1] in products and node.input[0] not in known
    )

    def edit(graph: Any, node: Any) -> None:
        put_behind(graph, node, ("Gather", [add_constant(graph, "first", np.zeros(1, np.int64))], {"axis": 0}))

    return at(residual.input[1], edit)


def swapped_inputs(model: Any) -> Damage:
    """Token ids where the mask belongs: both are integers of one shape."""
    first, second = (value.name for value in model.graph.input)
    other = {first: second, second: first}

    def damage(model: Any) -> None:
        if len(model.graph.input) < 2:
            return
        for node in model.graph.node:
            for position, name in enumerate(node.input):
                node.input[position] = other.get(name, name)

    return damage


def changed_opset(model: Any) -> Damage:
    def damage(model: Any) -> None:
        model.opset_import[0].version = 17  # the last without Gelu but one

    return damage
