"""Kernels kept as nodes: they are functions that engines take the bodies of, and change no result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from fewstep.app.bench.engine_table import available
from fewstep.app.cli import app
from fewstep.export.export import check_request, export_source, open_source
from fewstep.export.fold import fold_constants
from fewstep.export.graph import part_graph
from fewstep.export.large import digest
from fewstep.export.nodes import calls, inlined, keeping
from fewstep.kernels import apply, operators
from fewstep.kernels.dispatch import fused_everywhere
from fewstep.runtime.artefact import read_card
from fewstep.runtime.engines import find_exports, open_engines
from fewstep.runtime.engines.manifest import Manifest, State, read_manifest
from fewstep.runtime.engines.store import list_engines
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import load_model
from fewstep.runtime.files import read_json

from .conftest import copy

Arrays = dict[str, npt.NDArray[Any]]


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments), "--to", "onnx"], catch_exceptions=False)


def in_onnxruntime(model: Any, inputs: Arrays) -> list[npt.NDArray[Any]]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def in_openvino(model: Any, inputs: Arrays) -> list[npt.NDArray[Any]]:
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return list(compiled(inputs).to_tuple())


@pytest.fixture(scope="module")
def both(exported_to_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a student's plain engine, and of the one with nodes beside a copy of it."""
    directory = copy(exported_to_onnx, tmp_path_factory.mktemp("nodes") / "student")
    outcomes = [export(directory, "--kernels") for _ in range(2)]
    assert [" is up to date: " in outcome.stdout for outcome in outcomes] == [False, True]
    plain, kept = ((directory / "engines").glob(f"onnx-fp32-{kind}-*") for kind in ("1step", "kernels-1step"))
    return next(plain), next(kept)  # the one did not take the other's place


def test_a_student_keeps_a_node_for_each_kernel(both: tuple[Path, Path]) -> None:
    manifests: list[Manifest] = [read_manifest(folder) for folder in both]
    model = load_model(both[1].parent.parent, torch.device("cpu"))
    # Times are constants, and so are their embeddings.
    kept = {name: count for name, count in apply(model.network).items() if name != "timestep_embedding"}
    assert [manifest.nodes for manifest in manifests] == [{}, {"trajectory": kept}]
    assert manifests[0].graphs["text_encoder"] == manifests[1].graphs["text_encoder"]
    assert manifests[0].graphs["trajectory"] != manifests[1].graphs["trajectory"]
    report = read_json(both[1] / manifests[1].report)
    assert report["images"] == 12
    assert report["failure"] is None


def test_both_are_found_by_name(both: tuple[Path, Path]) -> None:
    directory = both[1].parent.parent
    key = read_card(directory).engine_key(1)
    for wanted, folders in (("onnx-fp32", both[:1]), ("onnx-fp32-kernels", both[1:]), ("onnx", both)):
        assert {folder for folder, _ in find_exports(directory, wanted, 1, key)[0]} == set(folders)
    engines = [engine for engine in list_engines(directory, thorough=True) if engine.target == "onnx"]
    listed = [(engine.precision, engine.state) for engine in engines]
    assert sorted(listed) == [("fp32", State.READY), ("fp32-kernels", State.READY)]
    names = [name for name in available(directory) if name.startswith("onnx")]
    assert names == ["onnx-fp32", "onnx-fp32-kernels"]
    for name in names:
        assert open_engines(directory, name, 1, key).name == "onnx"
    with pytest.raises(FewstepError, match=r"--to onnx --steps 2 --precision fp32 --kernels`$"):
        open_engines(directory, names[1], 2, read_card(directory).engine_key(2))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("run", [in_onnxruntime, in_openvino])
def test_a_students_images_are_the_plain_exports(
    both: tuple[Path, Path], run: Callable[[Any, Arrays], list[npt.NDArray[Any]]], batch: int
) -> None:
    onnx = pytest.importorskip("onnx")
    random = np.random.default_rng(0)
    inputs = {
        "noise": random.standard_normal((batch, 1, 4, 4, 4)).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((batch, 24, 384)).astype(np.float32),
        "encoder_attention_mask": np.ones((batch, 24), np.int64),
    }
    plain, kept = (onnx.load(folder / "trajectory.onnx") for folder in both)
    onnx.checker.check_model(kept, full_check=True)
    # OpenVINO has no functions: it gets what they stand for.
    ((expected,), (found,)) = (run(inlined(model) if run is in_openvino else model, inputs) for model in (plain, kept))
    assert expected.std() > 1
    assert np.abs(found.astype(int) - expected).max() <= 1


class Small(nn.Module):
    """A UNet of one resolution, whose result is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        blocks = {"down_block_types": ("DownBlock2D",), "mid_block_type": None, "up_block_types": ("UpBlock2D",)}
        shape = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6}
        self.network = UNet2DConditionModel(sample_size=4, **blocks, **shape)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.network(sample, timestep, encoder_hidden_states=None, return_dict=False)[0]
        return result


def test_a_unet_keeps_a_node_for_each_kernel() -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module = Small().eval()
    example = {"sample": torch.randn(2, 4, 4, 4), "timestep": torch.tensor([999, 20])}
    with keeping([module]):
        model = part_graph(module, example, ["out_sample"], {}).model
    assert calls(model) == apply(module)
    assert calls(model)["group_norm_silu"] > 5
    for batch in (1, 3):
        sample, timestep = torch.randn(batch, 4, 4, 4), torch.arange(20, 20 + batch)
        with torch.inference_mode():
            expected = module(sample, timestep).numpy()
        inputs = {"sample": sample.numpy(), "timestep": timestep.numpy()}
        for (found,) in (in_onnxruntime(model, inputs), in_openvino(inlined(model), inputs)):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Each(nn.Module):
    """Calls every operator once, with all kinds of arguments, some left out."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(2))
        self.vectors = nn.ParameterList(torch.randn(8) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, ...]:
        """`x` is (B, N, 8), `time` (B,)."""
        (first, second), (weight, bias) = self.weights, self.vectors
        scale = operators.timestep_embedding(time, 8, first, weight, second, bias, downscale_frequency_shift=1)
        normed = operators.adaptive_norm(x, None, scale, weight, kind="rms")
        stream, branch = operators.gated_residual_norm(x, normed, None, scale, epsilon=1e-3)
        gated = operators.gated_residual(stream, branch, scale[:, None])
        query, key = gated.unflatten(-1, (2, 4)), branch.unflatten(-1, (2, 4))[:, :, :1]
        query, key = operators.norm_rotary(query, key, weight[:4], None, first[: x.shape[1], :4], second[:3, 4:], 1e-4)
        unit = operators.gated_linear_unit(gated.mT, "gelu_tanh", dim=1)
        grouped = operators.group_norm_silu(gated.mT, 4, None, bias, scale=scale, activation=False)
        return query, key, unit, grouped


class One(nn.Module):
    """Calls one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` is (B, N, 8)."""
        normed: Tensor = operators.adaptive_norm(x)
        return normed


def test_each_body_is_the_reference_and_nothing_is_left_behind() -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module, names = Each().eval(), ["query", "key", "unit", "grouped"]
    example = {"x": torch.randn(2, 3, 8), "time": torch.rand(2)}
    plain = digest(part_graph(One(), {"x": example["x"]}, ["y"], {}).model)
    with fused_everywhere():
        model = fold_constants(part_graph(module, example, names, {}).model)
    assert digest(part_graph(One(), {"x": example["x"]}, ["y"], {}).model) == plain
    assert calls(model) == dict.fromkeys(sorted(calls(model)), 1)
    assert {f"{name}_1" for name in calls(model)} == {function.name for function in model.functions}
    assert len(model.functions) == 7
    example = {"x": torch.randn(3, 3, 8), "time": torch.rand(3)}
    found = in_onnxruntime(model, {key: value.numpy() for key, value in example.items()})
    for value, expected in zip(found, module(**example), strict=True):
        np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_what_holds_no_nodes_is_refused(student: Path) -> None:
    source = open_source(student, kernels=True)
    with pytest.raises(FewstepError, match=r"^only onnx in fp32 and tensorrt in fp16, bf16 or fp32 hold kernels"):
        export_source(source, check_request("onnx", "int8"))
    with pytest.raises(FewstepError, match="no layer of this model has a kernel"), keeping([nn.Linear(2, 2)]):
        pass
