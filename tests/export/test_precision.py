"""Half precision: what a graph computes stays the same to rounding, because what is sensitive stays in float32."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fewstep.export.precision import sensitive, to_half

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "fewstep[onnx]"')
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
PRECISIONS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ROUNDING = {"fp16": 2**-11, "bf16": 2**-8}


def model(nodes: Sequence[Any], inputs: dict[str, Any], outputs: Sequence[str], **constants: Any) -> Any:
    """A graph of float32 values."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "test", values, results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(operator: str, operands: str, result: str, **attributes: Any) -> Any:
    return helper.make_node(operator, operands.split(), [result], **attributes)


def run(graph: Any, **inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    from onnx.reference import ReferenceEvaluator

    results: list[npt.NDArray[Any]] = ReferenceEvaluator(graph).run(None, inputs)
    return results


def weights(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def copy(graph: Any) -> Any:
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    return changed


def perceptron() -> Any:
    nodes = [
        node("MatMul", "x w1", "a"),
        node("Relu", "a", "b"),
        node("MatMul", "b w2", "c"),
        node("Relu", "c", "d"),
        node("MatMul", "d w3", "y"),
    ]
    return model(nodes, {"x": ["batch", 8]}, ["y"], w1=weights(8, 16), w2=weights(16, 16), w3=weights(16, 4))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_compute_in_half_between_inputs_and_outputs_in_float32(precision: str) -> None:
    graph, x = perceptron(), weights(3, 8)
    (expected,) = run(graph, x=x)
    assert to_half(graph, precision) == {"last projections": 1}
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    half = PRECISIONS[precision]
    assert types == {f"w1_{precision}": half, f"w2_{precision}": half, "w3": TensorProto.FLOAT}
    (found,) = run(graph, x=x)
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 8 * ROUNDING[precision]  # inputs, weights and results of two layers, and some cancellation


def test_each_value_is_cast_once() -> None:
    graph = perceptron()
    graph.graph.node.insert(1, node("MatMul", "x w1", "unused"))
    to_half(graph, "fp16")
    casts = [(each.input[0], each.output[0]) for each in graph.graph.node if each.op_type == "Cast"]
    assert casts == [("x", "x_fp16"), ("d", "d_fp32")]


def test_an_output_to_look_at_changes_nothing() -> None:
    plain, watched, x = perceptron(), perceptron(), weights(3, 8)
    watched.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, None))
    to_half(plain, "fp16")
    to_half(watched, "fp16")
    result, seen = run(watched, x=x)
    np.testing.assert_array_equal(result, run(plain, x=x)[0])
    assert seen.dtype == np.float32
    np.testing.assert_array_equal(seen, seen.astype(np.float16))


def test_operands_that_are_float32_by_definition_stay_so() -> None:
    nodes = [node("Resize", "x  scales", "a", mode="nearest"), node("Conv", "a w", "b"), node("Conv", "b w", "y")]
    nodes[0].input[:] = ["x", "", "scales"]
    scales = np.array([1, 1, 2, 2], np.float32)
    graph = model(nodes, {"x": ["batch", 2, 4, 4]}, ["y"], scales=scales, w=weights(2, 2, 1, 1))
    to_half(graph, "fp16")
    resize = next(each for each in graph.graph.node if each.op_type == "Resize")
    assert list(resize.input) == ["x_fp16", "", "scales"]
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert types == {"scales": TensorProto.FLOAT, "w_fp16": TensorProto.FLOAT16, "w": TensorProto.FLOAT}


def linear_attention() -> Any:
    """Its normaliser is 0 wherever the query attends to nothing: 1e-15 alone keeps it from 0 / 0."""
    nodes = [
        node("MatMul", "x w1", "a"),
        node("Relu", "a", "q"),
        node("MatMul", "q w2", "values"),
        node("ReduceSum", "q axes", "sum"),
        node("Add", "sum tiny", "normaliser"),
        node("Div", "values normaliser", "mean"),
        node("MatMul", "mean w2", "b"),
        node("MatMul", "b w2", "y"),
    ]
    constants = {"w1": -np.eye(4, dtype=np.float32), "w2": weights(4, 4), "axes": np.array([-1])}
    return model(nodes, {"x": ["batch", 4]}, ["y"], **constants, tiny=np.float32(1e-15))


def test_a_constant_too_small_for_fp16_still_keeps_from_dividing_nothing_by_nothing() -> None:
    graph, x = linear_attention(), np.ones((1, 4), np.float32)
    kept = sensitive(graph.graph, TensorProto.FLOAT16)
    assert kept["constants"] == {"normaliser"}
    assert kept["statistics"] == {"sum", "normaliser", "mean"}
    assert sensitive(graph.graph, TensorProto.BFLOAT16)["constants"] == set()
    to_half(graph, "fp16")
    np.testing.assert_array_equal(run(graph, x=x)[0], 0)
    careless = linear_attention()
    for tensor in careless.graph.initializer:
        if tensor.name == "tiny":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(np.float16(1e-15)), "tiny"))
    with np.errstate(invalid="ignore"):
        assert np.isnan(run(careless, x=x)[0]).all()


def test_a_normalisation_written_out_is_float32_to_its_last_product() -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Pow", "a two", "square"),
        node("ReduceMean", "square axes", "mean"),
        node("Add", "mean epsilon", "variance"),
        node("Sqrt", "variance", "deviation"),
        node("Reciprocal", "deviation", "inverse"),
        node("Mul", "a inverse", "normal"),
        node("Mul", "normal gain", "scaled"),
        node("MatMul", "scaled w", "b"),
        node("MatMul", "b w", "y"),
    ]
    constants = {"two": np.float32(2), "axes": np.array([-1]), "epsilon": np.float32(1e-3)}
    graph = model(nodes, {"x": ["batch", 4]}, ["y"], w=300 * weights(4, 4), gain=weights(4), **constants)
    (expected,) = run(graph, x=weights(2, 4))
    parts = {"square", "mean", "variance", "deviation", "inverse", "normal"}
    assert sensitive(graph.graph, TensorProto.FLOAT16)["statistics"] == parts
    to_half(graph, "fp16")
    found = run(graph, x=weights(2, 4))[0]  # whose squares, beyond 65504, fp16 cannot hold
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_sampler_time_embedding_and_last_projections_are_found_by_how_values_flow() -> None:
    """Two steps of a network with a residual connection, which must not pass for the sampler's arithmetic."""

    def step(before: str, after: str) -> list[Any]:
        return [
            node("MatMul", f"{before} w", f"{after}_in"),
            node("Add", f"{after}_in embedding", f"{after}_timed"),
            node("MatMul", f"{after}_timed w", f"{after}_middle"),
            node("Add", f"{after}_middle {after}_in", f"{after}_residual"),
            node("MatMul", f"{after}_residual w", f"{after}_out"),
            node("Add", f"{after}_out bias", f"{after}_velocity"),
            node("Mul", f"{after}_velocity sigma", f"{after}_scaled"),
            node("Sub", f"{before} {after}_scaled", after),
        ]

    embedding = [
        node("Mul", "guidance frequency", "angle"),
        node("Sin", "angle", "sine"),
        node("MatMul", "sine w", "embedding"),
    ]
    decoder = [node("MatMul", "x_0 w", "hidden"), node("Relu", "hidden", "bent"), node("MatMul", "bent w", "image")]
    constants = {"w": weights(4, 4), "bias": weights(4), "sigma": np.float32(0.5), "frequency": weights(4)}
    nodes = [*embedding, node("Mul", "noise sigma", "x_1"), *step("x_1", "x_half"), *step("x_half", "x_0"), *decoder]
    graph = model(nodes, {"noise": ["batch", 4], "guidance": ["batch", 1]}, ["image"], **constants)
    kept = sensitive(graph.graph, TensorProto.FLOAT16)
    assert kept["sampler"] == {"x_1", "x_half", "x_0"}
    assert kept["time embedding"] == {"angle", "sine"}
    ends = {f"{step}_{part}" for step in ("x_half", "x_0") for part in ("out", "velocity", "scaled")}
    assert kept["last projections"] == {*ends, "image"}
    assert not kept["statistics"] | kept["constants"]
