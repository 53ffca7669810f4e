"""TensorRT engines: built on a CPU by TensorRT for RTX; what runs them, or makes them refittable, needs a GPU."""

import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress

from fewstep.export import tensorrt as target
from fewstep.export.graph import Graph
from fewstep.runtime.engines import tensorrt as engine
from fewstep.runtime.errors import FewstepError

from ..traced import graph_of, trajectory_of

REASON = 'TensorRT for RTX is not installed: pip install "fewstep[tensorrt]"'


@pytest.fixture(scope="module")
def graph(student: Path) -> Graph:
    """The trajectory of a tiny student."""
    pytest.importorskip("onnxscript")
    return graph_of(trajectory_of(student))


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason=REASON)


@pytest.mark.parametrize(
    ("capability", "precisions"),
    [
        ((7, 5), ("fp16", "fp32")),
        ((8, 6), ("fp16", "bf16", "fp32")),
        ((8, 9), ("fp16", "bf16", "fp32", "fp8")),
        ((12, 0), ("fp16", "bf16", "fp32", "fp8")),
    ],
)
def test_a_gpu_offers_the_types_that_it_multiplies(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precisions: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert target.precisions() == precisions


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_student_in_half_precision_draws_the_same_to_rounding(graph: Graph, tmp_path: Path, precision: str) -> None:
    onnx = pytest.importorskip("onnx")
    model, kept = target.convert(graph, precision)
    assert kept.keys() >= {"statistics", "sampler", "last projections"}
    from onnx.reference import ReferenceEvaluator

    inputs = {name: value.numpy() for name, value in graph.example.items()}
    (expected,), (found,) = (ReferenceEvaluator(each).run(None, inputs) for each in (graph.model, model))
    assert found.dtype == expected.dtype
    error = np.abs(found.astype(np.float64) - expected)
    assert 0 < error.mean() < {"fp16": 1e-3, "bf16": 1e-2}[precision] * np.ptp(expected)
    onnx.checker.check_model(graph.model)  # the original is as it was


@pytest.mark.parametrize(("capability", "precision"), [(89, "fp16"), (120, "bf16")])
def test_an_engine_is_built_for_a_gpu_that_is_not_there(
    graph: Graph, library: Any, monkeypatch: pytest.MonkeyPatch, capability: int, precision: str
) -> None:
    phases = []
    add_task = Progress.add_task

    def noting(self: Progress, description: str, **more: Any) -> Any:
        phases.append(description)
        return add_task(self, description, **more)

    monkeypatch.setattr(Progress, "add_task", noting)
    model, _ = target.convert(graph, precision)
    found = target.build(model, capability, refittable=False)
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert len(found) > weights
    assert phases[0] == "Building engine"
    assert len(phases) > 3


def test_an_interrupted_build_ends_as_one(graph: Graph, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Progress, description: str, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        target.build(graph.model, 89, refittable=False)


def test_a_gpu_that_tensorrt_for_rtx_does_not_know_is_refused(graph: Graph, library: Any) -> None:
    with pytest.raises(FewstepError, match=r"compute capabilities 7\.5, 8\.0, .*, not for 9\.0: install tensorrt, or"):
        target.build(graph.model, 90, refittable=False)


def test_an_operator_that_tensorrt_does_not_know_is_named(library: Any) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Unheard", ["x"], ["y"], name="node_7")]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n", 2])], [value("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(FewstepError, match=r"^tensorrt_rtx cannot read the graph \(Unheard node_7: .*\): use another"):
        target.build(model, 89, refittable=False)


def test_settings_of_a_build(graph: Graph, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, _ = engine.collect_errors(library)
    builder = library.Builder(logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert library.OnnxParser(network, logger).parse(graph.model.SerializeToString())
    flags = library.BuilderFlag
    settings = target.configure(library, builder, network, 89, refittable=False)
    assert not settings.get_flag(flags.TF32)
    assert not settings.get_flag(flags.REFIT)
    assert settings.get_compute_capability(0) == library.ComputeCapability.SM89
    assert settings.num_optimization_profiles == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert target.configure(library, builder, network, 89, refittable=True).get_flag(flags.REFIT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so(graph: Graph, library: Any, tmp_path: Path) -> None:
    (tmp_path / "trajectory.engine").write_bytes(b"")
    for attempt in (
        engine.library,
        lambda: engine.load(tmp_path, "trajectory", "fp16"),
        lambda: target.write(graph, tmp_path, "trajectory", "fp16"),
        lambda: target.refit(tmp_path, graph, tmp_path, "trajectory", "fp16"),
    ):
        with pytest.raises(FewstepError, match="TensorRT needs an NVIDIA GPU and its driver, and torch finds none"):
            attempt()
    with pytest.raises(FewstepError, match="tensorrt_rtx makes engines refittable only where there is an NVIDIA driv"):
        target.build(graph.model, 89, refittable=True)


def draw(folder: Path, graph: Graph, batch: int) -> np.ndarray[Any, Any]:
    inputs = {name: value[:1].expand(batch, *value.shape[1:]).numpy() for name, value in graph.example.items()}
    (result,) = engine.load(folder, "trajectory", "fp16")(**inputs).values()
    return result


@pytest.fixture
def gpu_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """What builds for this GPU; what it learns is kept apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not find_spec("tensorrt"):
        library = pytest.importorskip("tensorrt_rtx", reason=REASON)
        major, minor = torch.cuda.get_device_capability()
        if not hasattr(library.ComputeCapability, f"SM{major}{minor}"):
            pytest.skip("TensorRT for RTX does not build for this GPU, and TensorRT is not installed")
    name: str = engine.tensorrt().__name__
    return name


@pytest.mark.gpu
def test_an_engine_draws_what_torch_draws_in_any_batch(graph: Graph, gpu_library: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    target.write(graph, tmp_path / "a", "trajectory", "fp16")
    with torch.inference_mode():
        expected = graph.program.module()(*graph.example.values())[:1].numpy().astype(np.float64)
    for batch in (1, 3, 40, 2):
        found = draw(tmp_path / "a", graph, batch).astype(np.float64)
        assert found.shape == (batch, *expected.shape[1:])
        assert np.abs(found - expected).mean() < 0.01 * np.ptp(expected)
    learnt = [path.name for path in (tmp_path / "cache" / "fewstep").glob("*/*")]
    assert learnt == (["trajectory.kernels"] if gpu_library == "tensorrt_rtx" else ["timings"])


@pytest.mark.gpu
def test_what_was_learnt_about_a_gpu_is_used_again(graph: Graph, gpu_library: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def seconds() -> float:
        start = time.perf_counter()
        target.write(graph, tmp_path / "a", "trajectory", "fp16")
        draw(tmp_path / "a", graph, 1)
        return time.perf_counter() - start

    first = seconds()
    assert seconds() < first


@pytest.mark.gpu
def test_refitted_weights_draw_what_a_new_engine_draws(graph: Graph, gpu_library: str, tmp_path: Path) -> None:
    from onnx import ModelProto, numpy_helper

    other = ModelProto()
    other.CopyFrom(graph.model)
    for tensor in other.graph.initializer:
        if "proj" in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(0.5 * numpy_helper.to_array(tensor), tensor.name))
    for name in ("old", "new", "refitted"):
        (tmp_path / name).mkdir()
    target.write(graph, tmp_path / "old", "trajectory", "fp16")
    target.write(replace(graph, model=other), tmp_path / "new", "trajectory", "fp16")
    target.refit(tmp_path / "old", replace(graph, model=other), tmp_path / "refitted", "trajectory", "fp16")
    old, new, refitted = (draw(tmp_path / name, graph, 2).astype(np.float64) for name in ("old", "new", "refitted"))
    assert np.abs(old - new).max() > 0
    np.testing.assert_allclose(refitted, new, atol=0.01 * np.ptp(new))


@pytest.mark.gpu
def test_a_file_that_is_no_engine_of_this_gpu_is_refused(gpu_library: str, tmp_path: Path) -> None:
    (tmp_path / "trajectory.engine").write_bytes(b"no engine")
    with pytest.raises(FewstepError, match=r"cannot load .*: export it again on this machine"):
        engine.load(tmp_path, "trajectory", "fp16")
