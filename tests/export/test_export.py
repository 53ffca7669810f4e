"""Export keeps an engine only if it is right, says why if it is not, and does nothing twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.export.export import TARGETS, export_student
from fewstep.export.graph import Graph
from fewstep.runtime.engines.manifest import read_manifest
from fewstep.runtime.engines.onnx import OnnxEngine
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.trajectory import Pixels, Trajectory

from ..traced import graph_of, trajectory_of
from .conftest import OLDER, copy


def engines_of(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "engines").glob("*step-*"))


def test_each_export_stands_alone_in_its_folder(exported: Path) -> None:
    onnx, openvino = engines_of(exported)
    assert onnx.startswith("onnx-fp32-1step-")
    assert onnx != OLDER
    assert openvino.startswith(("openvino-bf16-1step-", "openvino-fp32-1step-"))
    for folder in (onnx, openvino):
        manifest = json.loads((exported / "engines" / folder / "manifest.json").read_text(encoding="utf-8"))
        written = {path.name for path in (exported / "engines" / folder).iterdir()}
        assert set(manifest["files"]) | {"manifest.json"} == written
        report = json.loads((exported / "engines" / folder / manifest["report"]).read_text(encoding="utf-8"))
        assert report["images"] == 12
        assert report["failure"] is None
        assert manifest["milliseconds"]["engine"] > 0
        assert manifest["shapes"]["trajectory"]["noise"] == ["batch", 1, 4, 4, 4]
        assert manifest["shapes"]["trajectory"]["pixels"] == ["batch", 8, 8, 3]
        assert manifest["shapes"]["text_encoder"]["encoder_hidden_states"] == ["batch", 24, 384]


def test_targets_are_made_from_the_same_graphs(exported: Path) -> None:
    onnx, openvino = (read_manifest(exported / "engines" / folder) for folder in engines_of(exported))
    assert onnx.graphs == openvino.graphs
    assert set(onnx.graphs) == {"trajectory", "text_encoder"}
    assert onnx.graphs["trajectory"] == onnx.files["trajectory.onnx"]  # which that target writes as it is


def test_of_two_builders_at_once_one_builds_and_the_other_takes_what_it_finds(
    builders: tuple[Path, list[str]],
) -> None:
    directory, said = builders
    (folder,) = (folder for folder in engines_of(directory) if folder.startswith("onnx"))
    built, found = sorted(said, key=lambda sentence: " is up to date: " in sentence)
    assert f"{folder} is written: " in built
    assert f"{folder} is up to date: " in found


def test_exporting_again_keeps_what_still_holds(exported: Path) -> None:
    folder = exported / "engines" / engines_of(exported)[0]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    report = export_student(exported, "onnx")
    assert report.reused
    assert "is up to date" in str(report)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("target", "steps", "precision", "sentence"),
    [
        ("tflite", None, None, "unknown export target 'tflite': choose onnx, openvino, tensorrt or aoti"),
        ("onnx", 3, None, "was distilled for 1 or 2 steps, not for 3"),
        ("onnx", None, "int4", "onnx has no precision 'int4' on this machine: choose fp32"),
    ],
)
def test_impossible_requests_are_refused(
    student: Path, target: str, steps: int | None, precision: str | None, sentence: str
) -> None:
    with pytest.raises(FewstepError, match=sentence):
        export_student(student, target, steps, precision)
    assert not (student / "engines").exists()


def test_a_teacher_is_refused(teacher: Path) -> None:
    with pytest.raises(FewstepError, match="is a teacher, and only students are exported as one graph"):
        export_student(teacher, "onnx")


def test_weights_that_are_not_the_cards_are_refused(student: Path, tmp_path: Path) -> None:
    directory = copy(student, tmp_path / "student")
    config = directory / "transformer" / "config.json"
    content = config.read_text(encoding="utf-8")
    config.unlink()
    config.write_text(content + " ", encoding="utf-8")
    with pytest.raises(FewstepError, match=r"are not those of its fewstep\.json"):
        export_student(directory, "onnx")


@pytest.fixture(scope="module")
def two_steps(student: Path) -> tuple[Trajectory, Graph]:
    pytest.importorskip("onnxscript")
    trajectory = trajectory_of(student, steps=2)
    return trajectory, graph_of(trajectory)


def test_a_graph_holds_all_steps(two_steps: tuple[Trajectory, Graph], tmp_path: Path) -> None:
    trajectory, graph = two_steps
    assert trajectory.draws == 2
    TARGETS["onnx"].write(graph, tmp_path, "graph", "fp32")
    noise = torch.randn(5, 2, 4, 4, 4)
    condition = {
        "encoder_hidden_states": torch.randn(5, 24, 384),
        "encoder_attention_mask": (torch.arange(24) < torch.tensor([[2], [5], [9], [24], [1]])).long(),
    }
    with torch.inference_mode():
        expected = Pixels(trajectory)(noise, **condition).numpy()
    engine = OnnxEngine(tmp_path / "graph.onnx")
    pixels = engine(noise=noise.numpy(), **{name: value.numpy() for name, value in condition.items()})["pixels"]
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # sums in another order may tip a rounding


def test_a_graph_computes_nothing_that_is_known_beforehand(two_steps: tuple[Trajectory, Graph]) -> None:
    _, graph = two_steps
    operators = {node.op_type for node in graph.model.graph.node}
    assert operators.isdisjoint({"Sin", "Cos", "Constant"})
    constants = {tensor.name for tensor in graph.model.graph.initializer}
    assert not [node.name for node in graph.model.graph.node if constants.issuperset(node.input)]
    used = {name for node in graph.model.graph.node for name in node.input}
    assert constants <= used


def test_a_graph_does_not_tell_where_it_was_made(two_steps: tuple[Trajectory, Graph]) -> None:
    _, graph = two_steps
    assert b".py" not in graph.model.SerializeToString()
