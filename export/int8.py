"""An ONNX graph with its matrix products in int8, scaled as they run; the layers that suffer most stay in float32."""

import logging
from pathlib import Path
from typing import Any

PRODUCTS = ("MatMul", "Gemm")
"""ONNX Runtime's convolutions are slower in int8."""
LAYERS = {*PRODUCTS, "Conv", "ConvTranspose"}
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Gather"}
NORMALISATIONS = {"LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "Pow"}
"""Of those written out, the square is the first operator."""


def write_int8(model: Any, path: Path) -> dict[str, int]:
    """Quantise a float32 graph and save it: weights in int8 for each output channel, activations for each call.

    The scale of an activation is that of its whole batch: an image depends a little on what is drawn with it.

    Args:
        model: an `onnx.ModelProto` without functions or subgraphs.
        path: of the file.

    Returns:
        How many matrix products each rule keeps in float32; see `kept_products`.
    """
    from onnx import ModelProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]  # the exporter's shapes, which contradict the quantiser's inference
    for position, node in enumerate(copy.graph.node):
        node.name = f"{node.op_type}_{position}"
    kept = kept_products(copy.graph)
    logging.disable(logging.WARNING)  # advice to preprocess what the exporter has simplified already
    try:
        quantize_dynamic(
            copy,
            path,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(set().union(*kept.values())),
        )
    finally:
        logging.disable(logging.NOTSET)
    return {rule: len(names) for rule, names in kept.items()}


def kept_products(graph: Any) -> dict[str, set[str]]:
    """Names of the matrix products that stay in float32, by rule; rules look at how values flow, never at names.

    - text encoder: all of a graph that takes no noise; in int8 it alone cost pictures 15 dB more than the network.
    - condition: those between a condition (text states, guidance scale) and the first normalisation, or the first
      meeting with the sample: the projection of captions, the embeddings of guidance and time.
    - last projection: those whose result the sampler or an output takes without a normalisation in between.

    Normalisations and all other operators are never quantised.
    """
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    if "noise" not in {value.name for value in graph.input}:
        return {"text encoder": {node.name for node in products}}
    flows = {"condition": _of_condition(graph), "last projection": _into_sampler(graph)}
    rules = {rule: {node.name for node in products if node.output[0] in values} for rule, values in flows.items()}
    return {rule: names for rule, names in rules.items() if names}


def _of_condition(graph: Any) -> set[str]:
    """Values that depend on conditions alone, up to the first normalisation of each."""
    constants = {tensor.name for tensor in graph.initializer}
    reached = {value.name for value in graph.input if value.name != "noise"}
    for node in graph.node:
        operands = {name for name in node.input if name} - constants
        if operands and operands <= reached and node.op_type not in NORMALISATIONS:
            reached.update(node.output)
    return reached


def _into_sampler(graph: Any) -> set[str]:
    """Values that lead to the sampler's arithmetic on the noise, or to an output, up to a layer or normalisation."""
    makers = {name: node for node in graph.node for name in node.output}
    sampled, pending = {"noise"}, [value.name for value in graph.output]
    for node in graph.node:
        if node.op_type in ARITHMETIC and sampled.intersection(node.input):
            pending.extend(node.input)
            sampled.update(node.output)
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        if name in makers and name not in reached:
            reached.add(name)
            if makers[name].op_type not in LAYERS | NORMALISATIONS:
                pending.extend(makers[name].input)
    return reached
