"""Exports in parts: each network a graph, one engine for every step count, scale and sampler, laid out as optimum's."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fewstep.app.bench.engine_table import available
from fewstep.app.cli import app
from fewstep.export import large
from fewstep.export.differences import END_TO_END, TOLERANCES
from fewstep.export.export import TARGETS, ExportReport, check_request, export_source, open_source
from fewstep.export.graph import Graph
from fewstep.export.parts import PartsSource
from fewstep.export.weight_only import BITS
from fewstep.runtime import Pipeline
from fewstep.runtime.engines.manifest import State, read_manifest
from fewstep.runtime.engines.parts import Parts
from fewstep.runtime.engines.store import list_engines, remove_engine, surplus
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import load_model

from ..families.conftest import save_stable_diffusion, save_stable_diffusion_3
from ..family_models import RANGE, save_student
from .conftest import copy

for library in ("onnxscript", "onnxruntime", "torchmetrics"):
    pytest.importorskip(library)
PROMPTS = ["a red cat", "two blue leaves in a wood"]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """No bars from loading and saving."""
    from fewstep.runtime.quiet import quiet

    with quiet("diffusers"), quiet("transformers"):
        yield


@pytest.fixture(scope="module")
def sd_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.x, exported."""
    directory = save_stable_diffusion(tmp_path_factory.mktemp("sd"), "epsilon")
    export(directory)
    return directory


@pytest.fixture(scope="module")
def translated(sd_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> PartsSource:
    """Its student of one or two steps, which takes the guidance scale, with the graphs that all its exports share."""
    directory = save_student(tmp_path_factory.mktemp("student") / "sd", sd_teacher, [1, 2], guided=True)
    source = PartsSource(directory)
    assert set(source.graphs) == {"text_encoder", "unet", "vae_decoder"}
    return source


@pytest.fixture(scope="module")
def sd_student(translated: PartsSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, exported."""
    source = beside(translated, tmp_path_factory.mktemp("exported") / "sd")
    export_source(source, check_request("onnx", "fp32"))
    return source.directory


@pytest.fixture(scope="module")
def sd3_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of Stable Diffusion 3 with all three text encoders, exported."""
    folder = tmp_path_factory.mktemp("sd3")
    directory = save_student(folder / "student", save_stable_diffusion_3(folder, t5=True), [1, 2])
    export(directory)
    return directory


@pytest.fixture
def changeable(sd_student: Path, tmp_path: Path) -> Path:
    """A copy of the student of Stable Diffusion with its engine."""
    return copy(sd_student, tmp_path / "student")


def export(directory: Path, target: str = "onnx") -> ExportReport:
    return export_source(open_source(directory, "parts"), check_request(target, "fp32"))


def beside(source: PartsSource, directory: Path) -> PartsSource:
    """A source for a copy of the student, or for what has become of it, with the same graphs."""
    if not directory.exists():
        copy(source.directory, directory)
    other = PartsSource(directory)
    vars(other)["_sized"] = source._sized
    return other


def engine_folder(directory: Path, target: str = "onnx") -> Path:
    (folder,) = (directory / "engines").glob(f"{target}-fp32-parts-*")
    return folder


def assert_draws_the_same(directory: Path, engine: str, **settings: Any) -> np.ndarray[Any, Any]:
    expected, found = (
        Pipeline.from_pretrained(directory, name).generate(PROMPTS, seed=4, **settings) for name in ("torch", engine)
    )
    assert found.engine == engine
    assert np.abs(found.arrays.astype(int) - expected.arrays).max() <= 1
    assert expected.arrays.std() > 1
    return expected.arrays


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("model", ["sd_student", "sd3_student"])
def test_one_export_serves_every_step_count(model: str, steps: int, request: pytest.FixtureRequest) -> None:
    assert_draws_the_same(request.getfixturevalue(model), "onnx", steps=steps)


def test_a_student_takes_every_scale_of_its_range(sd_student: Path) -> None:
    low, high = (assert_draws_the_same(sd_student, "onnx", guidance=scale) for scale in RANGE)
    assert np.abs(low.astype(int) - high).max() > 2


@pytest.mark.parametrize(("sampler", "steps", "guidance"), [("ddim", 3, 7.5), ("heun", 2, 3.0), ("euler", 1, 1.0)])
def test_a_teacher_is_guided_and_sampled_as_one_likes(
    sd_teacher: Path, sampler: str, steps: int, guidance: float
) -> None:
    assert_draws_the_same(sd_teacher, "onnx", sampler=sampler, steps=steps, guidance=guidance)


def test_openvino_draws_the_same(translated: PartsSource, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    source = beside(translated, tmp_path / "student")
    changeable, folder = source.directory, export_source(source, check_request("openvino", "fp32")).folder
    assert {path.name for path in folder.glob("unet/*")} == {
        "config.json",
        "openvino_model.bin",
        "openvino_model.xml",
    }
    for count in (1, 2):
        assert_draws_the_same(changeable, "openvino", steps=count)
    pipeline = Pipeline.from_pretrained(changeable, "openvino")
    assert pipeline.generate("a cat").arrays.shape == (1, 16, 16, 3)


def test_the_built_in_text_encoder_is_a_part_too(student: Path, tmp_path: Path) -> None:
    directory = copy(student, tmp_path / "student")
    folder = export(directory).folder
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "scheduler",
        "text_encoder",
        "transformer",
        "vae_decoder",
    }
    for steps in (1, 2):
        assert_draws_the_same(directory, "onnx", steps=steps)


def test_the_folder_is_laid_out_as_optimum_has_it(sd3_student: Path) -> None:
    folder = engine_folder(sd3_student)
    manifest, index = read_manifest(folder), json.loads((folder / "model_index.json").read_text())
    parts = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_decoder"]
    assert sorted(manifest.graphs) == parts
    for part in parts:
        assert {path.name for path in (folder / part).iterdir()} == {"config.json", "model.onnx"}
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"):
        for file in (sd3_student / tokenizer).iterdir():
            assert (folder / tokenizer / file.name).read_bytes() == file.read_bytes()
    assert manifest.shapes["transformer"]["hidden_states"] == ["batch", 4, "height", "width"]
    assert manifest.shapes["transformer"]["timestep"] == ["batch"]
    assert list(manifest.shapes["vae_decoder"]) == ["latent_sample", "sample"]
    texts = ["input_ids", "text_embeds", "last_hidden_state", *(f"hidden_states.{layer}" for layer in range(3))]
    assert list(manifest.shapes["text_encoder"]) == texts
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.files) | {"manifest.json"} == written


def test_a_unet_takes_one_time_and_images_of_any_size(sd_student: Path) -> None:
    folder = engine_folder(sd_student)
    shapes = read_manifest(folder).shapes["unet"]
    assert shapes["timestep"] == []
    assert shapes["sample"] == ["batch", 4, "height", "width"]
    network: Any = load_model(sd_student, torch.device("cpu")).network
    inputs = {
        "sample": torch.randn(3, 4, 12, 20),
        "timestep": torch.tensor(499.0),
        "encoder_hidden_states": torch.randn(3, 5, 16),
        "timestep_cond": torch.randn(3, 256),
    }
    with torch.inference_mode():
        expected = network(**inputs, return_dict=False)[0]
    engine = Parts(folder, read_manifest(folder))["unet"]
    found = engine(**{name: value.numpy() for name, value in inputs.items()})["out_sample"]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_what_was_exported_is_kept_and_what_is_stale_made_again(translated: PartsSource, changeable: Path) -> None:
    folder, request = engine_folder(changeable), check_request("onnx", "fp32")
    assert export_source(PartsSource(changeable), request).reused
    card = changeable / "fewstep.json"
    text = card.read_text()
    card.unlink()
    card.write_text(text.replace('"guidance": 3.0', '"guidance": 4.0').replace("0.5", "0.25"))
    with pytest.raises(FewstepError, match=r"built from other weights or for other times: run `fewstep export .* --to"):
        Pipeline.from_pretrained(changeable, "onnx")
    assert [engine.state for engine in list_engines(changeable)] == [State.STALE]
    assert not export_source(beside(translated, changeable), request).reused
    assert not folder.exists()
    assert_draws_the_same(changeable, "onnx", steps=2)


def test_files_of_parts_are_guarded_and_removed_with_them(changeable: Path) -> None:
    folder = engine_folder(changeable)
    assert [(engine.state, engine.steps) for engine in list_engines(changeable, thorough=True)] == [(State.READY, None)]
    foreign = folder / "unet" / "notes.txt"
    foreign.touch()
    assert list_engines(changeable, thorough=True)[0].reason.endswith("it holds the foreign file unet/notes.txt")
    foreign.unlink()
    graph = folder / "unet" / "model.onnx"
    content = graph.read_bytes()
    graph.unlink()
    graph.write_bytes(content[:-1] + b"\0")
    (engine,) = surplus(changeable, 1e12)
    assert engine.reason.endswith("its file unet/model.onnx changed")
    with pytest.raises(FewstepError, match=r"its file unet/model\.onnx changed: run `fewstep export"):
        Pipeline.from_pretrained(changeable, "onnx")
    remove_engine(engine.folder)
    assert not list((changeable / "engines").iterdir())


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder"])
def test_a_broken_part_is_refused_by_name(
    translated: PartsSource, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = beside(translated, tmp_path / "student")
    write, whole = TARGETS["onnx"].write, broken.graphs[part]

    def damaged(graph: Graph, folder: Path, name: str, precision: str) -> Any:
        from onnx import ModelProto, numpy_helper

        if set(graph.inputs) <= set(whole.inputs):
            changed = ModelProto()
            changed.CopyFrom(graph.model)
            weights = [tensor for tensor in changed.graph.initializer if len(tensor.dims) > 1]
            for tensor in weights[len(weights) // 2 :]:
                tensor.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(tensor), tensor.name))
            graph = replace(graph, model=changed)
        return write(graph, folder, name, precision)

    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=damaged))
    with pytest.raises(FewstepError, match=f"its {part.replace('_', ' ')}: .*; the first value to differ is .* in "):
        export_source(broken, check_request("onnx", "fp32"))
    refused = broken.directory / "refused" / "onnx-fp32-parts"
    report = json.loads((refused / "parity.json").read_text())
    assert report["failure"]["part"] == part
    assert (refused / "pictures.png").is_file()
    assert not (broken.directory / "engines").exists()


def test_auto_measures_parts_beside_torch(changeable: Path) -> None:
    pipeline = Pipeline.from_pretrained(changeable)
    assert engine_folder(changeable).name in pipeline.engine_reason
    assert "torch" in pipeline.engine_reason


def test_the_command_takes_parts_where_it_must_and_says_so(changeable: Path, teacher: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    outcome = run(changeable, "--to", "onnx")
    assert outcome.exit_code == 0
    assert "has text encoders of its own: it is exported in parts, for every step count" in outcome.stderr
    assert "onnx-fp32-parts-" in outcome.stdout
    assert "is up to date" in outcome.stdout
    assert "an export in parts serves every step count: leave --steps out" in str(
        run(changeable, "--to", "onnx", "--steps", 1).exception
    )
    assert "unknown shape 'whole': choose fused or parts" in str(run(changeable, "--shape", "whole").exception)
    assert "only students are exported as one graph" in str(run(teacher, "--to", "onnx").exception)


def test_parts_are_asked_for_and_listed_by_name(changeable: Path) -> None:
    (name,) = (each for each in available(changeable) if each.startswith("onnx"))
    assert name == "onnx-fp32-parts"
    for wanted in (name, "onnx-parts"):
        assert Pipeline.from_pretrained(changeable, wanted).engine_name == "onnx"
    with pytest.raises(FewstepError, match=r"no onnx-w8-parts engine: .* --to onnx --shape parts --precision w8`$"):
        Pipeline.from_pretrained(changeable, "onnx-w8-parts")


FEW_BITS = [
    ("onnx", "int8"),
    ("onnx", "w8"),
    ("onnx", "w4"),
    ("openvino", "bf16"),
    ("openvino", "w8"),
    ("openvino", "w4"),
]


@pytest.mark.parametrize(("target", "precision"), FEW_BITS)
def test_parts_in_few_bits_pass_the_gate(translated: PartsSource, tmp_path: Path, target: str, precision: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
        if precision in BITS:
            pytest.importorskip("nncf")
        elif precision not in TARGETS["openvino"].precisions():
            pytest.skip("no bfloat16 on this processor")
    source = beside(translated, tmp_path / "student")
    folder = export_source(source, check_request(target, precision)).folder
    manifest = read_manifest(folder)
    assert manifest.name == f"{target}-{precision}-parts"
    images = [
        Pipeline.from_pretrained(source.directory, name).generate(PROMPTS, steps=2, seed=4).arrays.astype(int)
        for name in ("torch", manifest.name)
    ]
    psnr = -10 * np.log10(np.square((images[0] - images[1]) / 255).mean())
    assert TOLERANCES[precision][END_TO_END]["psnr"] < psnr
    if precision != "bf16":
        assert manifest.sensitive["text_encoder"]["text encoder"] > 0
        assert manifest.sensitive["unet"]["condition"] > 0


def test_targets_of_whole_trajectories_are_refused(changeable: Path) -> None:
    with pytest.raises(FewstepError, match="exports in parts are for onnx or openvino, not for tensorrt"):
        PartsSource(changeable).require_target("tensorrt")


def test_a_graph_beyond_one_file_keeps_its_weights_beside_it(
    translated: PartsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    from onnx import numpy_helper

    graph = translated.graphs["unet"]
    small = large.digest(graph.model)
    monkeypatch.setattr(large, "LARGEST", 0)
    before = graph.model.SerializeToString()
    TARGETS["onnx"].write(graph, tmp_path, "model", "fp32")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data"}
    assert (tmp_path / "model.onnx").stat().st_size < len(before)
    assert graph.model.SerializeToString() == before
    read = onnx.load(tmp_path / "model.onnx")
    for found, expected in zip(read.graph.initializer, graph.model.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(found), numpy_helper.to_array(expected))
    with large.readable(graph.model) as path:
        onnx.checker.check_model(path)
    digest = large.digest(graph.model)
    assert digest != small
    changed = onnx.ModelProto()
    changed.CopyFrom(graph.model)
    weight = max(changed.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    assert large.digest(changed) != digest
