"""Weights in eight or four bits, arithmetic as before: for networks whose size, not whose sums, is what takes time.

The layers that suffer most stay as they are; `int8.kept_products` says which.
"""

import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from ..runtime.engines.openvino import openvino
from ..runtime.errors import require
from .int8 import kept_products, with_names, without_advice

BITS = {"w8": 8, "w4": 4}
"""Bits of a weight, by precision."""
GEMM = "/WithoutBiases"
"""What OpenVINO puts behind the name of a Gemm for its product; the name itself goes to the addition of the bias."""
BLOCK = 32
"""Weights that share a scale in four bits; with more of them, the largest costs the others their digits."""


def write_onnx(model: Any, path: Path, precision: str) -> dict[str, int]:
    """Save a float32 graph with the weights of its matrix products in blocks of few bits, for ONNX Runtime.

    Args:
        model: an `onnx.ModelProto` without functions or subgraphs.
        path: of the file.
        precision: a key of `BITS`.

    Returns:
        How many products each rule keeps.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = with_names(model)
    kept = kept_products(copy.graph)
    with without_advice():
        excluded = sorted(set().union(*kept.values()))
        quantiser = MatMulNBitsQuantizer(copy, bits=BITS[precision], block_size=BLOCK, nodes_to_exclude=excluded)
        quantiser.process()
    onnx.save(quantiser.model.model, path)
    return {rule: len(names) for rule, names in kept.items()}


def compressed(model: Any, precision: str) -> tuple[Any, dict[str, int]]:
    """A graph for OpenVINO with the weights of its matrix products in few bits.

    Args:
        model: an `onnx.ModelProto` without functions or subgraphs.
        precision: a key of `BITS`; in eight bits, each output channel has a scale; in four, what does not divide into
            blocks stays as it is.

    Returns:
        The `openvino.Model`, and how many products each rule keeps.

    Raises:
        FewstepError: OpenVINO or NNCF is missing.
    """
    library, nncf = openvino(), silent_nncf()
    copy = with_names(model)
    kept = kept_products(copy.graph)
    read = library.Core().read_model(copy.SerializeToString())
    settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if BITS[precision] == 4:
        settings = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": BLOCK, "ratio": 1.0, "all_layers": True}
        settings["advanced_parameters"] = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE
        )
    names = set().union(*kept.values())
    others = ("Convolution", "Gather")
    excluded = {
        node.get_friendly_name()
        for node in read.get_ops()
        if node.get_type_name() in others or node.get_friendly_name().removesuffix(GEMM) in names
    }
    with without_advice(), redirect_stdout(StringIO()):  # where NNCF draws its progress
        scope = nncf.IgnoredScope(names=sorted(excluded))
        result = nncf.compress_weights(read, ignored_scope=scope, **settings)
    return result, {rule: len(names) for rule, names in kept.items()}


def silent_nncf() -> Any:
    """NNCF, which would report its use to Google if this variable were not set before it is first imported."""
    os.environ["NNCF_CI"] = "1"
    return require("nncf", "quantise")
