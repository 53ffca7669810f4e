"""A LoRA in a student: its graph differs in weights alone, under the same names, and so an engine can take them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fewstep.app.cli import app
from fewstep.export import refit
from fewstep.export.export import check_request, export_student
from fewstep.export.source import Source
from fewstep.runtime.artefact import read_card
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import load_model

from ..traced import graph_of, trajectory_of
from .conftest import copy

pytest.importorskip("peft")
pytest.importorskip("onnxscript")
ADAPTED = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_out.0", "time_embed.linear")
"""Two that stay layers of the graph, and one whose results are constants there."""


@pytest.fixture(scope="module")
def lora(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `fewstep train` and diffusers write it."""
    network = load_model(student, torch.device("cpu")).network
    weights = {}
    for name in ADAPTED:
        rows, columns = network.get_submodule(name).weight.shape
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns) / columns**0.5
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2)
    file = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    save_file(weights, file)
    return file


@pytest.fixture(scope="module")
def merged(student: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with the LoRA."""
    out = tmp_path_factory.mktemp("merged") / "student"
    refit.save_merged(student, lora, out)
    return out


def test_a_student_with_a_lora_is_an_ordinary_student(student: Path, lora: Path, merged: Path) -> None:
    from safetensors.torch import load_file

    before, after = (load_model(each, torch.device("cpu")).network.state_dict() for each in (student, merged))
    assert before.keys() == after.keys()
    weights = load_file(lora)
    for name, weight in before.items():
        expected = weight
        if (layer := name.removesuffix(".weight")) in ADAPTED:
            factors = (weights[f"transformer.{layer}.lora_{factor}.weight"] for factor in "BA")
            expected = weight + torch.matmul(*factors)
        torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=1e-3)  # stored in half precision
    cards = [read_card(each) for each in (student, merged)]
    assert cards[0].weights != cards[1].weights
    assert cards[1].raw["lora"]["student"] == cards[0].weights
    assert cards[1].engine_key(1) != cards[0].engine_key(1)


def test_weights_replaced_by_name_make_the_graph_draw_with_the_lora(student: Path, merged: Path) -> None:
    """What TensorRT's refitter does to an engine, done to the graph."""
    runtime = pytest.importorskip("onnxruntime")
    before, after = (graph_of(trajectory_of(each)) for each in (student, merged))
    old, new = before.model, after.model
    for kind in ("node", "input", "output"):
        assert list(getattr(old.graph, kind)) == list(getattr(new.graph, kind))
    weights = {tensor.name: tensor for tensor in new.graph.initializer}
    assert [(each.name, each.dims, each.data_type) for each in old.graph.initializer] == [
        (each.name, each.dims, each.data_type) for each in weights.values()
    ]
    changed = {each.name for each in old.graph.initializer if each != weights[each.name]}
    # What the time makes of the last are some of them.
    assert len(ADAPTED) <= len(changed) < len(weights)
    inputs = {name: value.numpy() for name, value in after.example.items()}
    drawn = runtime.InferenceSession(old.SerializeToString()).run(None, inputs)
    for tensor in old.graph.initializer:
        tensor.CopyFrom(weights[tensor.name])
    drawn += runtime.InferenceSession(old.SerializeToString()).run(None, inputs)
    with torch.inference_mode():
        expected = after.program.module()(*after.example.values()).numpy()
    assert np.abs(drawn[0].astype(int) - expected).max() > 8
    assert np.abs(drawn[1].astype(int) - expected).max() <= 1


def test_a_lora_for_another_network_is_refused(student: Path, tmp_path: Path) -> None:
    network, file = load_model(student, torch.device("cpu")).network, tmp_path / "lora.safetensors"
    with pytest.raises(FewstepError, match=r"^cannot read .*: give the safetensors file of a LoRA$"):
        refit.merge(network, file, "transformer")
    save_file({"transformer.blocks.9.lora_A.weight": torch.ones(1, 1)}, file)
    with pytest.raises(FewstepError, match=r"is for another network than this transformer: it adapts blocks\.9$"):
        refit.merge(network, file, "transformer")
    layer = f"transformer.{ADAPTED[0]}"
    save_file({f"{layer}.lora_A.weight": torch.ones(1, 3), f"{layer}.lora_B.weight": torch.ones(3, 1)}, file)
    with pytest.raises(FewstepError, match="does not fit this transformer"):
        refit.merge(network, file, "transformer")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_tensorrt_or_a_gpu_nothing_is_written(student: Path, lora: Path, tmp_path: Path) -> None:
    arguments = ["engines", "refit", str(student), "--lora", str(lora), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, FewstepError)
    assert "tensorrt" in str(result.exception).lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_an_engine_takes_a_lora_without_a_build(student: Path, lora: Path, tmp_path: Path) -> None:
    """The gate compares it with torch; it is as good as one that is built."""
    try:
        check_request("tensorrt", "fp16")
    except FewstepError as missing:
        pytest.skip(str(missing))
    directory = copy(student, tmp_path / "student")
    with pytest.raises(FewstepError, match="has no tensorrt engine in fp16 for this machine: run `fewstep export"):
        refit.refit_engine(directory, lora, tmp_path / "out", "fp16")
    export_student(directory, "tensorrt", precision="fp16")
    report = refit.refit_engine(directory, lora, tmp_path / "out", "fp16")
    assert report.folder.parent.parent == tmp_path / "out"
    assert report.manifest.built_from == Source(tmp_path / "out").key
    with pytest.raises(FewstepError, match="is there already: give --out a new directory"):
        refit.refit_engine(directory, lora, tmp_path / "out", "fp16")
