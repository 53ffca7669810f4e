"""The OpenVINO target, made from the ONNX graph."""

from pathlib import Path
from typing import Any

from ..runtime.engines.openvino import SUFFIX, has_bf16
from ..runtime.errors import require


def precisions() -> tuple[str, ...]:
    """What this target is built in on this CPU, the default first."""
    return ("bf16", "fp32") if has_bf16() else ("fp32",)


def write(graph: Any, folder: Path, name: str, precision: str) -> None:
    """Write the files that the openvino engine loads.

    Args:
        graph: an `onnx.ModelProto`.
        folder: where to.
        name: of the files, without their suffix.
        precision: one of `precisions()`.
    """
    openvino = require("openvino", "openvino")
    model = openvino.Core().read_model(graph.SerializeToString())
    # Stored in float32 whatever the precision, which only says how the engine computes. Float16 halves the file but
    # makes small constants zero, such as the 1e-15 that keeps linear attention from dividing 0 by 0.
    openvino.save_model(model, folder / f"{name}{SUFFIX}", compress_to_fp16=False)
