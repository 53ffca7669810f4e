"""Matrix products in int8, but for those whose rounding shows."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.export.calibration import single_images
from fewstep.export.int8 import kept_products, write_int8, write_static_int8
from fewstep.runtime.engines.onnx import OnnxEngine
from fewstep.runtime.errors import FewstepError

from .sampling_network import inputs_of, network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


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


@pytest.mark.parametrize("scaled", ["as they run", "beforehand"])
def test_int8_is_near_float32(tmp_path: Path, scaled: str) -> None:
    inputs, model = inputs_of(8), network(1)
    onnx.save(model, tmp_path / "float.onnx")
    if scaled == "beforehand":
        write_static_int8(model, tmp_path / "int.onnx", single_images(inputs_of(64, seed=2)))
    else:
        write_int8(model, tmp_path / "int.onnx")
    expected, found = (OnnxEngine(tmp_path / name)(**inputs)["pixels"] for name in ("float.onnx", "int.onnx"))
    error = np.sqrt(np.square(found - expected).mean() / np.square(expected - inputs["noise"]).mean())
    assert 1e-4 < error < 0.02  # eight bits for each operand; equal results would be no int8


def test_scales_found_beforehand_leave_images_independent_of_their_batch(tmp_path: Path) -> None:
    kept = write_static_int8(network(2), tmp_path / "int.onnx", single_images(inputs_of(32)))
    assert kept == {"condition": 2, "last projection": 2}
    engine, inputs = OnnxEngine(tmp_path / "int.onnx"), inputs_of(5, seed=1)
    inputs["states"][1:] *= 50  # which would widen the scale of a batch
    alone = engine(**{name: array[:1] for name, array in inputs.items()})["pixels"]
    np.testing.assert_allclose(engine(**inputs)["pixels"][:1], alone, atol=1e-5)


def test_scales_need_samples_where_something_is_scaled(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="only whole trajectories have samples"):
        write_static_int8(network(1), tmp_path / "int.onnx", [])
    model = network(1)
    model.graph.input[0].name = model.graph.node[-2].input[0] = "tokens"
    assert write_static_int8(model, tmp_path / "int.onnx", []) == {"text encoder": 3}
