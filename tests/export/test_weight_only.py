"""Weights in few bits: smaller, near the original, and what suffers most stays as it was."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.export.export import check_request, export_source
from fewstep.export.source import Source
from fewstep.export.weight_only import BLOCK, compressed, write_onnx
from fewstep.runtime.engines.onnx import OnnxEngine
from fewstep.runtime.errors import FewstepError

from . import sampling_network
from .sampling_network import inputs_of, network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# Rounding to 255 or 15 levels over the range of a block of normal weights, some four times their deviation: in units of
# that deviation 4 / (levels sqrt(12)), and through one product the same of its result.
ERROR = {"w8": 0.005, "w4": 0.08}


def relative_error(found: Any, expected: Any, noise: Any) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected - noise).mean()))


@pytest.mark.parametrize("precision", ERROR)
def test_only_weights_of_hidden_products_are_rounded(tmp_path: Path, precision: str) -> None:
    model, inputs = network(2), inputs_of(8)
    before = model.SerializeToString()
    assert write_onnx(model, tmp_path / "small.onnx", precision) == {"condition": 2, "last projection": 2}
    assert model.SerializeToString() == before
    operators = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert operators.count("MatMul") == 4
    assert operators.count("MatMulNBits") == 2
    onnx.save(model, tmp_path / "float.onnx")
    expected, found = (OnnxEngine(tmp_path / name)(**inputs)["pixels"] for name in ("float.onnx", "small.onnx"))
    assert ERROR[precision] / 4 < relative_error(found, expected, inputs["noise"]) < 3 * ERROR[precision]


@pytest.mark.parametrize("precision", ERROR)
def test_openvino_rounds_the_same_weights(tmp_path: Path, precision: str) -> None:
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf", reason='nncf is not installed: pip install "fewstep[quantise]"')
    model, inputs = network(1), inputs_of(8)
    small, kept = compressed(model, precision)
    assert kept == {"condition": 1, "last projection": 1}
    types = {each.get_friendly_name(): each.get_output_element_type(0).to_string() for each in small.get_ops()}
    assert types["hidden"] == {"w8": "u8", "w4": "u4"}[precision]
    assert types["caption"] == types["last"] == "f32"
    onnx.save(model, tmp_path / "float.onnx")
    expected = OnnxEngine(tmp_path / "float.onnx")(**inputs)["pixels"]
    plain = {"INFERENCE_PRECISION_HINT": "f32"}
    (found,) = openvino.Core().compile_model(small, "CPU", plain)(inputs).values()
    assert ERROR[precision] / 4 < relative_error(found, expected, inputs["noise"]) < 3 * ERROR[precision]


def test_openvino_keeps_a_product_that_has_a_bias() -> None:
    for library in ("openvino", "nncf"):
        pytest.importorskip(library)
    model = network(1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(sampling_network.WIDTH, np.float32), "bias"))
    caption = model.graph.node[0]
    caption.op_type = "Gemm"
    caption.input.append("bias")
    small, kept = compressed(model, "w8")
    assert kept == {"condition": 1, "last projection": 1}
    types = [
        each.get_output_element_type(0).to_string() for each in small.get_ops() if each.get_type_name() == "Constant"
    ]
    matrices = [each for each in small.get_ops() if each.get_type_name() == "MatMul"]
    assert (len(matrices), types.count("u8")) == (3, 2)  # the hidden product's weights and their zero points


def test_openvino_leaves_weights_that_do_not_divide_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("openvino", "nncf"):
        pytest.importorskip(library)
    monkeypatch.setattr(sampling_network, "WIDTH", BLOCK + 8)
    small, _ = compressed(network(1), "w4")
    types = {each.get_friendly_name(): each.get_output_element_type(0).to_string() for each in small.get_ops()}
    assert types["hidden"] == "f32"


def test_few_bits_in_openvino_need_nncf(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(FewstepError, match=r'nncf is not installed: pip install "fewstep\[quantise\]"'):
        compressed(network(1), "w8")


def test_what_is_missing_is_said_before_anything_is_traced(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("openvino", "onnxscript", "torchmetrics"):
        pytest.importorskip(library)
    monkeypatch.setitem(sys.modules, "nncf", None)
    source = Source(student)
    with pytest.raises(FewstepError, match=r'^nncf is not installed: pip install "fewstep\[quantise\]"$'):
        export_source(source, check_request("openvino", "w4"))
    assert "graphs" not in vars(source)


def test_nncf_reports_to_nobody_and_draws_no_progress(tmp_path: Path) -> None:
    for library in ("openvino", "nncf", "openvino_telemetry"):
        pytest.importorskip(library)
    onnx.save(network(1), tmp_path / "float.onnx")
    code = (
        "import sys, onnx\n"
        "from fewstep.export.weight_only import compressed\n"
        "compressed(onnx.load(sys.argv[1]), 'w8')\n"
        "from nncf.telemetry import wrapper\n"
        "print('reports' if isinstance(wrapper.telemetry, wrapper.NNCFTelemetry) else 'silent')\n"
    )
    program = [sys.executable, "-P", "-c", code, tmp_path / "float.onnx"]  # under pytest NNCF is silent anyway
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NNCF_")}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "silent\n"), done.stderr


def test_openvinos_converter_reports_to_nobody() -> None:
    for library in ("openvino", "openvino_telemetry"):
        pytest.importorskip(library)
    program = (
        "from fewstep.runtime.engines.openvino import library\n"
        "library()\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "print(telemetry_utils.tm.__name__)\n"
    )
    said = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "openvino.tools.ovc.telemetry_stub"
