"""Our kernels as plugins of TensorRT: launched as TensorRT does, in Triton's interpreter; and their assembly."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.export import plugins, tensorrt
from fewstep.export.graph import Graph
from fewstep.export.nodes import DOMAIN, calls, keeping
from fewstep.export.ptx import as_old_as, without_scratch
from fewstep.kernels import operators
from fewstep.kernels.compilation import CAPABILITIES
from fewstep.runtime.errors import FewstepError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("triton", reason="triton is not installed, which compiles the plugins")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="this runs in Triton's interpreter")
BATCH = None
ROWS, VECTOR = (BATCH, 5, 24), (BATCH, 24)
CASES: dict[str, tuple[str, dict[str, tuple[int | None, ...]], dict[str, Any]]] = {
    "norm": ("adaptive_norm", {"x": ROWS, "weight": (24,)}, {"epsilon": 1e-5, "kind": "rms"}),
    "norm by sample": (
        "adaptive_norm",
        {"x": ROWS, "scale": VECTOR, "shift": VECTOR},
        {"epsilon": 0.1, "kind": "layer"},
    ),
    "norm by row": (
        "adaptive_norm",
        {"x": ROWS, "scale": ROWS, "shift": (1, 1, 24)},
        {"epsilon": 1e-6, "kind": "layer"},
    ),
    "residual": ("gated_residual", {"residual": ROWS, "branch": ROWS, "gate": (BATCH, 1, 24)}, {}),
    "residual, one gate": ("gated_residual", {"residual": ROWS, "branch": ROWS, "gate": (1, 24)}, {}),
    "both": (
        "gated_residual_norm",
        {"residual": ROWS, "branch": ROWS, "scale": (1, 1, 24), "weight": (24,), "bias": (24,)},
        {"epsilon": 1e-3, "kind": "layer"},
    ),
    "both, gated": (
        "gated_residual_norm",
        {"residual": ROWS, "branch": ROWS, "gate": ROWS, "scale": VECTOR, "shift": ROWS},
        {"epsilon": 1e-3, "kind": "rms"},
    ),
    "unit": ("gated_linear_unit", {"x": (BATCH, 3, 48)}, {"activation": "gelu", "dim": -1}),
    "unit of channels": ("gated_linear_unit", {"x": (BATCH, 6, 4, 4)}, {"activation": "silu", "dim": 1}),
    "rotary": (
        "norm_rotary",
        {"query": (BATCH, 5, 2, 16), "key": (BATCH, 5, 3, 16), "key_weight": (16,), "cos": (5, 16), "sin": (5, 16)},
        {"epsilon": 1e-3, "interleaved": 1},
    ),
    "rotary of halves": (
        "norm_rotary",
        {"query": (BATCH, 5, 2, 16), "key": (BATCH, 5, 2, 16), "cos": (5, 16), "sin": (5, 16)},
        {"epsilon": 1e-3, "interleaved": 0},
    ),
    "norms alone": (
        "norm_rotary",
        {"query": (BATCH, 5, 2, 8), "key": (BATCH, 3, 2, 8)},
        {"epsilon": 1e-3, "interleaved": 0},
    ),
    "groups": (
        "group_norm_silu",
        {"x": (BATCH, 12, 4, 4), "weight": (12,), "bias": (12,), "scale": (BATCH, 12), "shift": (BATCH, 12)},
        {"groups": 3, "epsilon": 1e-2, "activation": 1},
    ),
    "groups, plain": ("group_norm_silu", {"x": (BATCH, 8, 16)}, {"groups": 2, "epsilon": 1e-2, "activation": 0}),
}
"""Operator, shapes and constants, as a node of the graph has them."""


def tensorrt_launch(launch: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Launch a kernel as TensorRT does: inputs, whole numbers, outputs, and nothing else."""
    batch = len(inputs[0])
    given = [*inputs, *launch.numbers(batch), *outputs]
    grid = launch.grid(batch, lambda size, share: -(-size // share))
    named = dict(zip(launch.parameters, given, strict=True))
    launch.kernel[(grid,)](**named, **launch.constants, num_warps=launch.warps)


@interpreted
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_launched_in_tensorrts_order_computes_its_operation(case: str, dtype: torch.dtype, batch: int) -> None:
    from fewstep.kernels.plugins_triton import launch

    operator, shapes, constants = CASES[case]
    given = {name: torch.randn([batch if size is None else size for size in shape]) for name, shape in shapes.items()}
    given = {name: value.to(dtype) for name, value in given.items()}
    found = launch(operator, shapes, constants)
    assert found
    absent = {"query_weight": None, "key_weight": None, "cos": None, "sin": None} if operator == "norm_rotary" else {}
    expected = getattr(operators, operator)(**absent | given | constants)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    outputs = [torch.full_like(value, float("nan")) for value in expected]
    tensorrt_launch(found, list(given.values()), outputs)
    # Half precision is rounded once by both; a number between two may go to either.
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    for value, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("operator", "shapes", "constants"),
    [
        ("timestep_embedding", {"t": (BATCH,)}, {}),
        ("adaptive_norm", {"x": (BATCH, 5, 8192)}, {"epsilon": 1e-6, "kind": "layer"}),
        ("adaptive_norm", {"x": (BATCH, 5, 20)}, {"epsilon": 1e-6, "kind": "layer"}),
        ("adaptive_norm", {"x": (BATCH, None, 24)}, {"epsilon": 1e-6, "kind": "layer"}),
        ("adaptive_norm", {"x": (1, 5, 24)}, {"epsilon": 1e-6, "kind": "layer"}),
        ("gated_linear_unit", {"x": (BATCH, 48)}, {"activation": "gelu", "dim": 0}),
        ("gated_linear_unit", {"x": (BATCH, 3, 8)}, {"activation": "gelu", "dim": 2}),
        ("group_norm_silu", {"x": (BATCH, 320, 64, 64)}, {"groups": 32, "epsilon": 1e-5, "activation": 1}),
    ],
)
def test_what_takes_several_launches_or_unknown_sizes_is_left_to_tensorrt(
    operator: str, shapes: dict[str, tuple[int | None, ...]], constants: dict[str, Any]
) -> None:
    from fewstep.kernels.plugins_triton import launch

    assert launch(operator, shapes, constants) is None


@pytest.fixture(scope="module")
def graph(student: Path) -> Graph:
    """A tiny student's trajectory with its kernels as nodes, which have their references as bodies."""
    from ..traced import graph_of, trajectory_of  # not above: a process of its own imports this file alone

    trajectory = trajectory_of(student)
    with keeping([trajectory]):
        return graph_of(trajectory)


def run(model: Any, inputs: dict[str, Any], known: dict[str, plugins.Plugin]) -> Any:
    """Run a graph by ONNX's reference, and its plugins as TensorRT launches them."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    def operation(plugin: plugins.Plugin) -> Any:
        def _run(self: Any, *arrays: Any, **_: Any) -> tuple[Any, ...]:
            given = [torch.tensor(array) for array in arrays]
            outputs = [torch.empty_like(given[place]) for place in plugin.likes]
            if plugin.halved is not None:
                outputs = [each.chunk(2, plugin.halved)[0].contiguous() for each in outputs]
            tensorrt_launch(plugin.launch, given, outputs)
            return tuple(each.numpy() for each in outputs)

        return type(plugin.name, (OpRun,), {"op_domain": DOMAIN, "_run": _run})

    (result,) = ReferenceEvaluator(model, new_ops=[operation(each) for each in known.values()]).run(None, inputs)
    return result


@interpreted
@pytest.mark.parametrize(("precision", "levels"), [("fp32", 1), ("fp16", 3)])
def test_a_student_of_plugins_draws_what_the_references_draw(graph: Graph, precision: str, levels: int) -> None:
    placed, known = plugins.place(graph.model)
    assert not placed.functions
    handed = [node for node in placed.graph.node if node.domain == DOMAIN]
    assert len(handed) == sum(calls(graph.model).values())
    assert {node.op_type for node in handed} == set(known)
    attributes = {(each.name, each.s) for node in handed for each in node.attribute}
    assert attributes == {("plugin_namespace", b"fewstep"), ("plugin_version", b"1")}
    model, _ = tensorrt.convert(replace(graph, model=placed), precision)
    inputs = {name: value.numpy() for name, value in graph.example.items()}
    expected, found = run(graph.model, inputs, {}), run(model, inputs, known)
    assert found.dtype == np.uint8
    assert expected.std() > 1
    assert np.abs(found.astype(int) - expected).max() <= levels


def test_times_are_constants_with_kernels_too(graph: Graph) -> None:
    """Else every image would compute its time embedding and modulations, in half precision."""
    assert "timestep_embedding" not in calls(graph.model)
    constants = {tensor.name for tensor in graph.model.graph.initializer}
    gates = [node.input[2] for node in graph.model.graph.node if node.op_type.startswith("gated_residual_1")]
    assert gates
    assert constants.issuperset(gates)


def test_tensorrts_parser_looks_for_the_plugin_of_a_node(graph: Graph) -> None:
    """TensorRT for RTX has the parser, and no plugins to find."""
    library = pytest.importorskip("tensorrt_rtx")
    placed, known = plugins.place(graph.model)
    with pytest.raises(
        FewstepError, match="Plugin not found, are the plugin name, version, and namespace correct"
    ) as told:
        tensorrt.build(placed, 89, refittable=False)
    assert any(name in str(told.value) for name in known)
    assert library.get_plugin_registry() is not None


COMPILE = """
import json, sys
import tensorrt_plugin as module
from fewstep.export.plugins import register
from test_plugins import CASES, plugin

for case, capability, dtype in json.loads(sys.argv[1]):
    made = plugin(case)
    for _ in range(2):
        register(module, made, capability)
    found = module.built(f"fewstep::{made.name}", list(CASES[case][1].values()), dtype)
    print(json.dumps(found | {"counts": made.launch.counts, "warps": made.launch.warps}))
    del module.registry[f"fewstep::{made.name}"], vars(module.op.fewstep)[made.name]
"""


def plugin(case: str) -> plugins.Plugin:
    from fewstep.kernels.plugins_triton import launch

    operator, shapes, constants = CASES[case]
    found = launch(operator, shapes, constants)
    assert found
    results = 2 if operator in ("norm_rotary", "gated_residual_norm") else 1
    likes = (0, 1) if operator == "norm_rotary" else (0,) * results
    halved = constants["dim"] % len(shapes["x"]) if operator == "gated_linear_unit" else None
    return plugins.Plugin(f"{operator}_{len(case)}", tuple(shapes), likes, halved, found)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What TensorRT is given for each case, GPUs and types taking turns; Triton's interpreter cannot compile."""
    kinds, gpus = ("FLOAT", "HALF", "BF16"), len(CAPABILITIES)
    jobs = [(case, CAPABILITIES[turn % gpus], kinds[turn % 3]) for turn, case in enumerate(CASES)]
    cache = str(tmp_path_factory.mktemp("triton"))
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
    command = [sys.executable, "-P", "-c", COMPILE, json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [{"job": job, **row} for job, row in zip(jobs, rows, strict=True)]


def test_the_assembly_takes_what_tensorrt_passes(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        case, capability, _ = row["job"]
        (entry,) = re.findall(r"\.visible \.entry (\w+)\(([^)]*)\)", row["ptx"])
        assert entry[0] == row["name"]
        kinds = ["pointer" if ".ptr" in each else each.split()[1] for each in entry[1].split(",")]
        inputs, numbers = len(CASES[case][1]), len(row["extra"][0])
        assert kinds == [*["pointer"] * inputs, *[".u32"] * numbers, *["pointer"] * len(row["results"])]
        assert re.search(rf"^\.target sm_{capability}a?$", row["ptx"], re.MULTILINE)
        assert re.findall(r"\.reqntid (\d+)", row["ptx"]) == [str(row["threads"])]
        assert row["shared_bytes"] <= 48 * 1024
        assert "global_smem" in row["ptx"] or not row["shared_bytes"]
        assert "/" not in re.sub(r"//.*", "", row["ptx"]), "a path of this machine"


def test_tensorrt_learns_the_launch_that_runs_in_the_interpreter(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        made = plugin(row["job"][0])
        assert row["threads"] == 32 * made.launch.warps
        assert row["grid"] == [made.launch.grid(batch, lambda size, share: -(-size // share)) for batch in (1, 3)]
        assert row["extra"] == [made.launch.numbers(batch) for batch in (1, 3)]
        x = [3 if size is None else size for size in CASES[row["job"][0]][1][made.inputs[0]]]
        if made.halved is not None:
            x[made.halved] //= 2
        assert row["results"][0] == x


def test_the_assembly_is_valid_also_for_the_oldest_driver_of_its_gpu(
    compiled: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    for row in compiled[::5]:
        capability = row["job"][1]
        assembler = folder / ("ptxas-blackwell" if capability >= 90 else "ptxas")
        if not assembler.exists():
            pytest.skip("this triton brings no ptxas")
        source = tmp_path / "kernel.ptx"
        source.write_text(as_old_as(row["ptx"], 87 if capability >= 100 else 80))
        architecture = re.search(r"^\.target (\w+)", row["ptx"], re.MULTILINE)
        assert architecture
        command = [assembler, f"--gpu-name={architecture[1]}", source, "-o", tmp_path / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


PTX = """
.version 9.4
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 128
{
	ld.param.b64 %rd1, [kernel_param_0];
}
"""


def test_parameters_for_scratch_memory_are_dropped_only_where_nothing_reads_them() -> None:
    name, found = without_scratch(PTX, 2)
    assert name == "kernel"
    assert found == PTX.replace(",\n\t.param .u64 .ptr .global .align 1 kernel_param_2", "")
    assert without_scratch(PTX, 3)[1] == PTX
    for ptx, parameters in ((PTX, 0), (PTX, 1), (PTX, 4), (PTX.replace("[kernel_param_0]", "[kernel_param_2]"), 2)):
        with pytest.raises(FewstepError, match="kernel kernel needs other parameters than a plugin is given"):
            without_scratch(ptx, parameters)
    for ptx, count in ((PTX + PTX, 2), ("", 0)):
        with pytest.raises(FewstepError, match=f"Triton wrote {count} kernels where a plugin is one"):
            without_scratch(ptx, 2)


def test_the_version_is_lowered_never_raised() -> None:
    assert as_old_as(PTX, 87) == PTX.replace("9.4", "8.7")
    assert as_old_as(PTX, 95) == as_old_as(PTX, None) == PTX


@pytest.mark.parametrize(
    ("library", "contents", "sentence"),
    [
        (
            "tensorrt_rtx",
            {},
            r"^TensorRT for RTX takes no plugins: pip install tensorrt \(10\.9 or newer\), or leave --",
        ),
        (
            "tensorrt",
            {"__version__": "10.7.0"},
            "^tensorrt 10.7.0 has no plugins that are compiled ahead of time: install",
        ),
    ],
)
def test_a_tensorrt_without_such_plugins_is_named(
    monkeypatch: pytest.MonkeyPatch, library: str, contents: dict[str, Any], sentence: str
) -> None:
    module = ModuleType(library)
    vars(module).update(contents)
    module.__spec__ = SimpleNamespace(name=library)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, library, module)
    if library == "tensorrt_rtx":
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(FewstepError, match=sentence):
        plugins.require_plugins()
