"""Programs compiled ahead of time compute what torch does, and are loaded only if they are what was exported."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.export import aoti
from fewstep.export.fold import drop_unused
from fewstep.export.graph import Graph, text_encoder_graph
from fewstep.runtime.artefact import read_card
from fewstep.runtime.engines import Arrays, open_engines
from fewstep.runtime.engines import aoti as engine
from fewstep.runtime.errors import FewstepError

from ..stored_engine import store_engine

WIDTH = 16


class Network(nn.Module):
    """A block with a normalisation and a last projection, and an input that only its end needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        hidden = self.hidden(self.norm(self.first(x)).relu()).relu()
        return self.last(scale * hidden)


@pytest.fixture(scope="module")
def graph() -> Graph:
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    torch.manual_seed(0)
    return text_encoder_graph(Network().requires_grad_(False), inputs(4))


def inputs(batch: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, WIDTH), "scale": torch.rand(batch, 1) + 0.5}


def error(found: Arrays, graph: Graph, given: dict[str, Tensor]) -> float:
    """The largest difference from the program that the graph was translated from."""
    assert list(found) == graph.outputs
    expected = graph.program.module()(*given.values()).numpy()
    return float(np.abs(found[graph.outputs[0]] - expected).max())


def test_a_compiled_program_computes_what_torch_does_in_any_batch(graph: Graph, tmp_path: Path) -> None:
    try:
        aoti.precisions()
    except FewstepError as reason:
        pytest.skip(str(reason))
    assert aoti.write(graph, tmp_path, "graph", "fp32") is None
    compiled = engine.load(tmp_path, "graph", "fp32")
    for batch in (1, 3, 8):
        given = inputs(batch)
        found = compiled(**{name: value.numpy() for name, value in given.items()})
        assert error(found, graph, given) < 1e-5  # sums in another order


def test_in_bf16_only_what_no_rule_keeps_is_rounded(graph: Graph) -> None:
    function, kept = aoti.program_of(graph, "bf16")
    assert kept == {"statistics": 1, "last projections": 1}
    given = inputs(8)
    (found,) = function(*given.values())
    assert 1e-5 < error({graph.outputs[0]: found.numpy()}, graph, given) < 0.05  # eight bits of values of about one


def test_a_part_of_a_program_takes_and_gives_what_its_graph_does(graph: Graph) -> None:
    from onnx import ModelProto, TensorProto, helper

    part = ModelProto()
    part.CopyFrom(graph.model)
    del part.graph.output[:]
    part.graph.output.append(helper.make_tensor_value_info("layer_norm", TensorProto.FLOAT, None))
    drop_unused(part.graph)
    del part.graph.input[1:]
    function, kept = aoti.program_of(replace(graph, model=part), "fp32")
    (found,) = function(torch.ones(3, WIDTH))
    assert kept is None
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(3), atol=1e-6, rtol=0)


def test_without_a_compiler_the_target_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def find_none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find_none)  # torch's own search
    with pytest.raises(FewstepError, match=r"aoti compiles C\+\+, and there is no compiler here: install g\+\+"):
        aoti.precisions()


def test_a_package_whose_hash_is_not_the_manifests_is_never_loaded(student: Path, tmp_path: Path) -> None:
    from .conftest import copy

    directory = copy(student, tmp_path / "student")
    folder = store_engine(directory, target="aoti", library=engine.library())
    key = read_card(directory).engine_key(1)
    (folder / "trajectory.pt2").write_bytes(b"code of somebody else's")
    with pytest.raises(FewstepError, match=r"holds the foreign file trajectory\.pt2"):
        open_engines(directory, "aoti", 1, key)
    (folder / "trajectory.pt2").unlink()
    (folder / "trajectory.onnx").write_bytes(b"code of somebody else's")
    with pytest.raises(FewstepError, match=r"its file trajectory\.onnx changed"):
        open_engines(directory, "aoti", 1, key)


def test_a_package_for_other_instructions_is_refused(student: Path, tmp_path: Path) -> None:
    from .conftest import copy

    directory = copy(student, tmp_path / "student")
    capability = torch.backends.cpu.get_cpu_capability()
    assert engine.library().startswith(f"torch {torch.__version__} {capability}")
    store_engine(directory, target="aoti", library=engine.library().replace(capability, "AVX10"))
    with pytest.raises(FewstepError, match=r"was built with torch .* AVX10, and this is torch"):
        open_engines(directory, "aoti", 1, read_card(directory).engine_key(1))
