"""The first wrong value of a graph is found wherever it is, in few runs of little."""

from collections.abc import Callable, Mapping
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.export.diagnosis import first_difference
from fewstep.export.export import TARGETS
from fewstep.export.graph import Graph, text_encoder_graph
from fewstep.runtime.engines import Arrays, engine_module


class Branches(nn.Module):
    """Residual blocks, and a branch and an input that are needed at the end alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.skip = nn.Linear(6, 6)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        early = self.skip(x).tanh()
        for block in self.blocks:
            x = x + block(x).relu()
        return scale * (x * early)


@pytest.fixture(scope="module")
def graph() -> Graph:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    torch.manual_seed(0)
    return text_encoder_graph(Branches().requires_grad_(False), batch(4))


def batch(size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 6), "scale": torch.rand(size, 1) + 0.5}


@pytest.fixture
def values(graph: Graph) -> list[str]:
    """Names that torch has too, in the order in which they are computed."""
    known = {node.name for node in graph.program.graph.nodes}
    results = [node.output[0] for node in graph.model.graph.node]
    return [name for name in results if name in known or name == graph.model.graph.output[0].name]


class Target:
    """Runs what it is given, after doing something to it; counts how often, and how much it was asked for."""

    def __init__(
        self, folder: Path, inputs: Mapping[str, Tensor], damage: Callable[[Any], None], name: str = "onnx"
    ) -> None:
        self.folder, self.inputs, self.damage, self.name = folder, inputs, damage, name
        self.widths: list[int] = []

    def __call__(self, part: Graph) -> Arrays:
        self.widths.append(len(part.outputs))
        self.damage(part.model.graph)
        TARGETS[self.name].write(part, self.folder, "probe", "fp32")
        engine = engine_module(self.name).load(self.folder, "probe", "fp32")
        return engine(**{name: self.inputs[name].numpy() for name in part.inputs})


def doubled(name: str) -> Callable[[Any], None]:
    """Twice the value, for all that use it."""
    from onnx import helper

    def damage(graph: Any) -> None:
        for position, node in enumerate(graph.node):
            if name in node.output:
                node.output[0] = f"half_{name}"
                graph.node.insert(position + 1, helper.make_node("Add", [f"half_{name}"] * 2, [name]))
                return

    return damage


def without(name: str) -> Callable[[Any], None]:
    """Fails where the value is computed."""

    def damage(graph: Any) -> None:
        for node in graph.node:
            if name in node.output:
                raise RuntimeError("no such operator")

    return damage


@pytest.mark.parametrize("damage", [doubled, without])
def test_any_fault_is_found_by_its_value(
    graph: Graph, values: list[str], tmp_path: Path, damage: Callable[[str], Callable[[Any], None]]
) -> None:
    inputs = batch(3)  # another size than the example's
    for name in values[1:]:
        target = Target(tmp_path, inputs, damage(name))
        place = first_difference(graph, target, inputs, "fp32")
        assert place.split()[0] == name
        assert len(target.widths) <= ceil(log2(len(values))) + 2
        assert max(target.widths) <= 3  # the stream, a branch of it, and the branch that waits for the end


def test_targets_that_drop_unused_inputs_are_searched_too(graph: Graph, values: list[str], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for name in (values[1], values[-1]):
        target = Target(tmp_path, graph.example, doubled(name), "openvino")
        assert first_difference(graph, target, graph.example, "fp32").split()[0] == name


def test_where_time_runs_out_a_stretch_of_the_graph_is_named(graph: Graph, values: list[str], tmp_path: Path) -> None:
    target = Target(tmp_path, graph.example, doubled(values[3]))
    place = first_difference(graph, target, graph.example, "fp32", longest=0)
    first, last = values[0], values[-1]
    assert place.startswith(f"one from {first} (")
    assert f" to {last} (Mul) in the graph itself" in place
    assert len(target.widths) == 2


def test_the_operator_and_the_module_are_named(graph: Graph, values: list[str], tmp_path: Path) -> None:
    places = [
        first_difference(graph, Target(tmp_path, graph.example, doubled(name)), graph.example, "fp32")
        for name in (values[0], values[-1])
    ]
    assert places[0].endswith(" in skip")
    assert places[1] == "encoder_hidden_states (Mul) in the graph itself"


def test_a_sound_graph_has_no_fault(graph: Graph, tmp_path: Path) -> None:
    target = Target(tmp_path, graph.example, lambda graph: None)
    assert first_difference(graph, target, graph.example, "fp32") == ""
    assert target.widths[-1] == 1  # all of it, at last


def test_no_value_is_to_blame_where_nothing_runs(graph: Graph) -> None:
    def broken(part: Graph) -> Arrays:
        raise OSError("no such driver")

    assert first_difference(graph, broken, graph.example, "fp32") == ""


def test_a_precision_is_given_its_rounding(graph: Graph, values: list[str], tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def rounded(graph: Any) -> None:
        """The first value in bfloat16."""
        for position, node in enumerate(graph.node):
            if values[0] in node.output:
                node.output[0] = "exact"
                kinds = (TensorProto.BFLOAT16, "rounded", "exact"), (TensorProto.FLOAT, values[0], "rounded")
                for offset, (kind, after, before) in enumerate(kinds, 1):
                    graph.node.insert(position + offset, helper.make_node("Cast", [before], [after], to=kind))
                return

    found = {
        precision: first_difference(graph, Target(tmp_path, graph.example, rounded), graph.example, precision)
        for precision in ("fp32", "bf16")
    }
    assert found["fp32"].startswith(values[0])
    assert found["bf16"] == ""
