"""Matrix products in int8, but for those whose rounding shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.export.int8 import kept_products, write_int8
from fewstep.runtime.engines.onnx import OnnxEngine

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

WIDTH = 32


def network(steps: int) -> Any:
    """A sampler of so many steps: a caption projection, a normalisation, a hidden product and a last projection."""
    generator = np.random.default_rng(0)
    weights = {
        name: generator.standard_normal((WIDTH, WIDTH), np.float32) / 6 for name in ("caption", "hidden", "last")
    }
    weights |= {"scale": np.ones(WIDTH, np.float32), "shape": np.array([-1, WIDTH])}
    nodes, x = [], "noise"
    for step in range(steps):
        value = {name: f"{name}_{step}" for name in ("projected", "normed", "mixed", "bent", "v", "flat", "x")}
        nodes += [
            helper.make_node("MatMul", ["states", "caption"], [value["projected"]], f"caption_{step}"),
            helper.make_node("LayerNormalization", [value["projected"], "scale"], [value["normed"]]),
            helper.make_node("MatMul", [value["normed"], "hidden"], [value["mixed"]], f"hidden_{step}"),
            helper.make_node("Tanh", [value["mixed"]], [value["bent"]]),
            helper.make_node("MatMul", [value["bent"], "last"], [value["v"]], f"last_{step}"),
            helper.make_node("Reshape", [value["v"], "shape"], [value["flat"]]),
            helper.make_node("Sub", [x, value["flat"]], [value["x"]]),
        ]
        x = value["x"]
    nodes.append(helper.make_node("Identity", [x], ["pixels"]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("noise", "states")]
    outputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", WIDTH])]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "network", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_caption_and_the_last_projection_stay_whatever_their_names(steps: int) -> None:
    kept = kept_products(network(steps).graph)
    assert kept == {
        "condition": {f"caption_{step}" for step in range(steps)},
        "last projection": {f"last_{step}" for step in range(steps)},
    }


def test_only_the_rest_is_computed_in_int8(tmp_path: Path) -> None:
    model = network(2)
    before = model.SerializeToString()
    assert write_int8(model, tmp_path / "graph.onnx") == {"condition": 2, "last projection": 2}
    assert model.SerializeToString() == before
    operators = [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node]
    assert operators.count("MatMul") == 4
    assert operators.count("MatMulInteger") == 2


def test_a_text_encoder_stays_as_it_is(tmp_path: Path) -> None:
    model = network(1)
    model.graph.input[0].name = model.graph.node[-2].input[0] = "tokens"
    assert write_int8(model, tmp_path / "graph.onnx") == {"text encoder": 3}
    operators = [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node]
    assert operators.count("MatMul") == 3


def test_int8_is_near_float32(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    inputs = {name: generator.standard_normal((8, WIDTH), np.float32) for name in ("noise", "states")}
    model = network(1)
    onnx.save(model, tmp_path / "float.onnx")
    write_int8(model, tmp_path / "int.onnx")
    expected, found = (OnnxEngine(tmp_path / name)(**inputs)["pixels"] for name in ("float.onnx", "int.onnx"))
    error = np.sqrt(np.square(found - expected).mean() / np.square(expected - inputs["noise"]).mean())
    assert 1e-4 < error < 0.02  # eight bits for each operand; equal results would be no int8
