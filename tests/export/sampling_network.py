"""A tiny sampler as ONNX: each step projects a caption, normalises, and has a hidden product and a last projection."""

from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH = 32


def inputs_of(batch: int, seed: int = 1) -> dict[str, npt.NDArray[np.float32]]:
    """What it takes."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal((batch, WIDTH), np.float32) for name in ("noise", "states")}


def network(steps: int) -> Any:
    """A sampler of so many steps."""
    from onnx import TensorProto, helper, numpy_helper

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
