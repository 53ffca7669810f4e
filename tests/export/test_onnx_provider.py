"""ONNX Runtime that cannot use its GPU is refused, for in silence it would run on the CPU."""

from pathlib import Path

import pytest
import torch

from fewstep.runtime.engines.onnx import OnnxEngine
from fewstep.runtime.errors import FewstepError


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_falling_back_to_the_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "same", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "same.onnx")
    OnnxEngine(tmp_path / "same.onnx")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    with pytest.raises(FewstepError, match="offers CUDAExecutionProvider and runs on CPUExecutionProvider: install"):
        OnnxEngine(tmp_path / "same.onnx")
