"""An ONNX graph with its matrix products in int8; the layers that suffer most stay in float32.

Activations are scaled as they run, or once and for all by what they were on samples.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.engines import Arrays
from .calibration import require_samples

PRODUCTS = ("MatMul", "Gemm")
"""ONNX Runtime's convolutions are slower in int8."""
LAYERS = {*PRODUCTS, "Conv", "ConvTranspose"}
SAMPLES = {"noise", "sample", "hidden_states", "latent_sample"}
"""What networks and decoders call the input that becomes the image."""
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
    from onnxruntime.quantization import QuantType, quantize_dynamic

    copy = with_names(model)
    kept = kept_products(copy.graph)
    with without_advice():
        quantize_dynamic(
            copy,
            path,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(set().union(*kept.values())),
        )
    return {rule: len(names) for rule, names in kept.items()}


def write_static_int8(model: Any, path: Path, samples: Sequence[Arrays]) -> dict[str, int]:
    """As `write_int8`, with one scale for each activation: the range that it had on samples. Images are independent.

    Args:
        model: an `onnx.ModelProto` without functions or subgraphs.
        path: of the file.
        samples: inputs of single images, of which a graph that keeps all its products needs none.

    Raises:
        FewstepError: there are no samples, and products to scale by them.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    copy = with_names(model)
    kept = kept_products(copy.graph)
    excluded = set().union(*kept.values())
    if all(node.name in excluded for node in copy.graph.node if node.op_type in PRODUCTS):
        path.write_bytes(model.SerializeToString())
        return {rule: len(names) for rule, names in kept.items()}
    require_samples(samples)
    with without_advice():
        quantize_static(
            copy,
            path,
            _Reader(samples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(excluded),
            extra_options={"MatMulConstBOnly": True},
        )
    return {rule: len(names) for rule, names in kept.items()}


class _Reader:
    """Samples one after the other, as ONNX Runtime's calibration takes them."""

    def __init__(self, samples: Sequence[Arrays]) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Arrays | None:
        return next(self._samples, None)


def with_names(model: Any) -> Any:
    """A copy of an `onnx.ModelProto` whose nodes have names, which quantisers go by."""
    from onnx import ModelProto

    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]  # the exporter's shapes, which contradict the quantisers' inference
    for position, node in enumerate(copy.graph.node):
        node.name = f"{node.op_type}_{position}"
    return copy


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence what quantisers say about graphs that the exporter has simplified already."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def kept_products(graph: Any) -> dict[str, set[str]]:
    """Names of the matrix products that stay in float32, by rule; rules look at how values flow, never at names.

    - text encoder: all of a graph that takes nothing of `SAMPLES`; in int8 it alone cost pictures 15 dB more than the
      network.
    - condition: those between a condition (text states, guidance scale) and the first normalisation, or the first
      meeting with the sample: the projection of captions, the embeddings of guidance and time.
    - last projection: those whose result the sampler or an output takes without a normalisation in between.

    Normalisations and all other operators are never quantised.
    """
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    if not SAMPLES.intersection(value.name for value in graph.input):
        return {"text encoder": {node.name for node in products}}
    flows = {"condition": _of_condition(graph), "last projection": _into_sampler(graph)}
    rules = {rule: {node.name for node in products if node.output[0] in values} for rule, values in flows.items()}
    return {rule: names for rule, names in rules.items() if names}


def _of_condition(graph: Any) -> set[str]:
    """Values that depend on conditions alone, up to the first normalisation of each."""
    constants = {tensor.name for tensor in graph.initializer}
    reached = {value.name for value in graph.input if value.name not in SAMPLES}
    for node in graph.node:
        operands = {name for name in node.input if name} - constants
        if operands and operands <= reached and node.op_type not in NORMALISATIONS:
            reached.update(node.output)
    return reached


def _into_sampler(graph: Any) -> set[str]:
    """Values that lead to the sampler's arithmetic on the noise, or to an output, up to a layer or normalisation."""
    makers = {name: node for node in graph.node for name in node.output}
    sampled, pending = {*SAMPLES}, [value.name for value in graph.output]
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
