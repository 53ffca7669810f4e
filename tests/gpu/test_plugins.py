"""Our kernels inside TensorRT engines: the same pictures with plugins and without; the times of both are noted."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.export import tensorrt as target
from fewstep.export.graph import Graph
from fewstep.export.nodes import keeping
from fewstep.export.plugins import require_plugins
from fewstep.runtime.engines import tensorrt as engine
from fewstep.runtime.errors import FewstepError

from ..traced import graph_of, trajectory_of

STUDENT = Path(__file__).parents[2] / "models" / "emoji-student"
Record = Callable[[str, object], None]


def shipped(kernels: bool) -> Graph:
    """The trajectory of the shipped student."""
    trajectory = trajectory_of(STUDENT)
    with keeping([trajectory] if kernels else []):
        return graph_of(trajectory)


def milliseconds(run: Callable[[], Any]) -> float:
    """Of a call, the median of a hundred."""
    laps = []
    for _ in range(100):
        start = time.perf_counter()
        run()
        laps.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(laps), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_engine_with_plugins_draws_what_torch_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record, precision: str
) -> None:
    for library in ("onnxscript", "diffusers"):
        pytest.importorskip(library)
    try:
        require_plugins()
    except FewstepError as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("plain", "plugins"):
        torch.manual_seed(0)
        graph = shipped(kernels=name == "plugins")
        (tmp_path / name).mkdir()
        target.write(graph, tmp_path / name, "trajectory", precision)
        loaded = engine.load(tmp_path / name, "trajectory", precision)
        with torch.inference_mode():
            expected = graph.program.module()(*graph.example.values())[:1].numpy().astype(np.float64)
        for batch in (1, 3, 2):
            arrays = {key: value[:1].expand(batch, *value.shape[1:]).numpy() for key, value in graph.example.items()}
            (found,) = loaded(**arrays).values()
            assert found.shape == (batch, *expected.shape[1:])
            assert np.abs(found - expected).mean() < 0.01 * np.ptp(expected)
            record_property(f"{name}, batch {batch}, ms", milliseconds(lambda: loaded(**arrays)))  # noqa: B023
