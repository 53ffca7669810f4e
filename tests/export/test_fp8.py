"""Products with operands in float8: near float32, with one scale for each operand."""

from typing import Any

import numpy as np
import pytest

from fewstep.export import tensorrt as target
from fewstep.export.calibration import single_images
from fewstep.export.fp8 import LARGEST, quantise
from fewstep.export.precision import to_half

from .sampling_network import inputs_of, network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def rounded() -> Any:
    model = network(2)
    before = model.SerializeToString()
    result, kept = quantise(model, single_images(inputs_of(32, seed=2)))
    assert kept == {"condition": 2, "last projection": 2}
    assert model.SerializeToString() == before
    return result


def run(model: Any, inputs: Any) -> Any:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, inputs)[0]


def test_operands_of_hidden_products_pass_through_float8(rounded: Any) -> None:
    onnx.checker.check_model(rounded)
    operators = [node.op_type for node in rounded.graph.node]
    assert operators.count("QuantizeLinear") == 2  # an activation in each step
    assert operators.count("DequantizeLinear") == 3  # and one weight, which both have
    weights = {tensor.name: tensor for tensor in rounded.graph.initializer}
    assert "hidden" not in weights
    assert weights["hidden_float8"].data_type == onnx.TensorProto.FLOAT8E4M3FN
    stored = onnx.numpy_helper.to_array(weights["hidden_float8"]).astype(np.float32)
    assert np.abs(stored).max() == LARGEST


@pytest.mark.parametrize("between", ["fp32", "fp16"])
def test_float8_is_near_float32(rounded: Any, between: str) -> None:
    inputs = inputs_of(8)
    model = onnx.ModelProto()
    model.CopyFrom(rounded)
    if between == "fp16":
        to_half(model, "fp16")
        onnx.checker.check_model(model)
    expected, found = run(network(2), inputs), run(model, inputs)
    error = np.sqrt(np.square(found - expected).mean() / np.square(expected - inputs["noise"]).mean())
    assert 0.01 < error < 0.06  # three bits of fraction round by 2^-4 at most, by a third of that in the mean square


@pytest.mark.parametrize("capability", [89, 120])
def test_tensorrt_builds_it(rounded: Any, capability: int) -> None:
    pytest.importorskip("tensorrt_rtx", reason='TensorRT for RTX is not installed: pip install "fewstep[tensorrt]"')
    model = onnx.ModelProto()
    model.CopyFrom(rounded)
    to_half(model, "fp16")
    assert target.build(model, capability, refittable=False)
