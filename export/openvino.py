"""The OpenVINO target, made from the ONNX graph."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ..runtime.engines import PRECISIONS
from ..runtime.engines.openvino import SUFFIX, has_bf16, openvino
from .graph import Graph
from .large import readable
from .weight_only import BITS, compressed, silent_nncf


def precisions() -> tuple[str, ...]:
    """What this target is built in on this CPU, the default first."""
    return tuple(each for each in PRECISIONS["openvino"] if each != "bf16" or has_bf16())


def require_library(precision: str) -> None:
    """Raise `FewstepError` if NNCF is missing, and the precision needs it."""
    if precision in BITS:
        silent_nncf()


def write(graph: Graph, folder: Path, name: str, precision: str) -> Mapping[str, int] | None:
    """Write the files that the openvino engine loads.

    Args:
        graph: what to write.
        folder: where to.
        name: of the files, without their suffix.
        precision: one of `precisions()`.

    Returns:
        What few bits leave in full precision, by rule.

    Raises:
        FewstepError: OpenVINO is missing, or NNCF for few bits.
    """
    library, path = openvino(), folder / f"{name}{SUFFIX}"
    # Stored in float32 whatever the precision, which only says how the engine computes. Float16 halves the file but
    # makes small constants zero, such as the 1e-15 that keeps linear attention from dividing 0 by 0.
    save = partial(library.save_model, output_model=path, compress_to_fp16=False)
    if precision in BITS:
        model, kept = compressed(graph.model, precision)
        save(model)
        return kept
    with readable(graph.model) as source:
        save(library.Core().read_model(source))
    return None
