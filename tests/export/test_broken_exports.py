"""Ten ways to break an export, each caught by the gate before anything is kept, or by the cache before it is run."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.export.export import TARGETS, check_request, export_source
from fewstep.export.graph import Graph
from fewstep.export.source import Source
from fewstep.runtime.artefact import read_card, save_artefact
from fewstep.runtime.engines import TEXT_ENCODER, TRAJECTORY, find_exports, open_engines
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import sana

from ..tiny_models import tiny_autoencoder, tiny_transformer
from .conftest import copy as linked_copy
from .damage import (
    Damage,
    batch_of_the_example,
    changed_opset,
    first_image_for_all,
    layer_norm_as_instance_norm,
    overflow,
    swapped_inputs,
    transposed_weight,
    wrong_scheduler_constant,
)

Refuse = Callable[[str, Callable[[Any], Damage]], dict[str, Any]]
"""Exports with damage to one part, made by looking at it whole; gives the report of the refusal."""


@pytest.fixture(scope="module")
def translated(student: Path) -> Source:
    """The student with its graphs, which all exports here begin with."""
    for library in ("onnxscript", "onnxruntime", "torchmetrics"):
        pytest.importorskip(library)
    source = Source(student)
    assert set(source.graphs) == {TEXT_ENCODER, TRAJECTORY}
    return source


@pytest.fixture
def source(translated: Source, tmp_path: Path) -> Source:
    """The same in a folder of its own."""
    return beside(translated, tmp_path)


@pytest.fixture(scope="module")
def kept(translated: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with an engine that passed the gate."""
    directory = linked_copy(translated.directory, tmp_path_factory.mktemp("kept") / "student")
    export_source(beside(translated, directory), check_request("onnx"))
    return directory


@pytest.fixture
def exported(kept: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return linked_copy(kept, tmp_path / "student")


def beside(source: Source, directory: Path) -> Source:
    """The same student, whose engines go elsewhere."""
    moved = copy.copy(source)
    moved.directory = directory
    return moved


def open_onnx(directory: Path) -> None:
    open_engines(directory, "onnx", 1, read_card(directory).engine_key(1))


# Damage on the way to the target


@pytest.fixture
def refuse(source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[Refuse]:
    """Export through a target that gets graphs wrong; nothing but the refusal may be left."""
    request, write = check_request("onnx"), TARGETS["onnx"].write

    def refuse(part: str, make: Callable[[Any], Damage]) -> dict[str, Any]:
        whole = source.graphs[part].model
        damage, inputs = make(whole), {value.name for value in whole.graph.input}

        def broken(graph: Graph, folder: Path, name: str, precision: str) -> Any:
            from onnx import ModelProto

            changed = ModelProto()
            changed.CopyFrom(graph.model)
            if inputs.issuperset(graph.inputs):
                damage(changed)
            return write(replace(graph, model=changed), folder, name, precision)

        monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=broken))
        with pytest.raises(FewstepError, match="onnx in fp32 does not draw what torch draws: ") as raised:
            export_source(source, request)
        folder = source.directory / "refused" / "onnx-fp32-1step"
        assert not (source.directory / "engines").exists()
        report: dict[str, Any] = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
        assert report["failure"]["reason"] in str(raised.value)
        assert report["failure"]["place"] in str(raised.value)
        assert (folder / "pictures.png").is_file() == ("end_to_end" in report["worst"])
        return report

    yield refuse
    assert {path.name for path in source.directory.iterdir()} <= {"refused", ".engines.lock"}


@pytest.mark.parametrize(
    ("make", "place", "batches"),
    [
        (layer_norm_as_instance_norm, "(LayerNormalization) in trajectory.network.transformer_blocks.0.norm1", {1}),
        (transposed_weight, "in trajectory.network.caption_projection.linear_2", {1}),
        (wrong_scheduler_constant, "(Mul) in trajectory", {1}),
        (overflow, "(Conv) in trajectory.network.patch_embed.proj", {1}),
        (first_image_for_all, "(Mul) in trajectory.network.transformer_blocks.0", {3, 8}),
    ],
)
def test_a_wrong_trajectory_is_refused_by_its_first_wrong_value(
    refuse: Refuse, make: Callable[[Any], Damage], place: str, batches: set[int]
) -> None:
    report = refuse(TRAJECTORY, make)
    assert report["failure"]["part"] == "trajectory"
    assert "its trajectory: " in report["failure"]["reason"]
    assert report["failure"]["place"].endswith(place)
    assert int(report["failure"]["case"].rpartition(" in a batch of ")[2]) in batches
    assert report["worst"]["text_encoder"]["rms"] < report["tolerance"]["text_encoder"]["rms"]


def test_swapped_inputs_are_refused(refuse: Refuse) -> None:
    report = refuse(TEXT_ENCODER, swapped_inputs)
    assert report["failure"]["part"] == "text_encoder"
    assert "its text encoder: " in report["failure"]["reason"]
    assert report["failure"]["place"]


def test_a_batch_size_folded_into_the_graph_is_refused(refuse: Refuse) -> None:
    report = refuse(TRAJECTORY, batch_of_the_example)
    assert report["failure"]["part"] == "trajectory"
    assert report["failure"]["case"] == "a batch of 1"
    assert "its trajectory cannot run: " in report["failure"]["reason"]
    assert "(Reshape) in trajectory.network" in report["failure"]["place"]


def test_a_changed_opset_is_refused(refuse: Refuse) -> None:
    report = refuse(TRAJECTORY, changed_opset)
    assert report["failure"]["part"] == "build"
    assert "cannot be built or opened: " in report["failure"]["reason"]
    assert report["failure"]["place"].endswith("(Gelu) in trajectory.network.caption_projection.act_1")


def test_a_file_that_was_cut_short_in_writing_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    write = TARGETS["onnx"].write

    def truncated(graph: Graph, folder: Path, name: str, precision: str) -> None:
        write(graph, folder, name, precision)
        file = folder / f"{name}.onnx"
        os.truncate(file, file.stat().st_size // 2)

    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=truncated))
    with pytest.raises(FewstepError, match="cannot be built or opened: ") as raised:
        export_source(source, check_request("onnx"))
    assert "the first value" not in str(raised.value)  # no value is to blame where not even the first can be had
    assert not (source.directory / "engines").exists()


# Damage to what was kept


def test_a_file_that_was_cut_short_later_is_not_opened_and_is_made_again(translated: Source, exported: Path) -> None:
    (file,) = (exported / "engines").glob("onnx-*/trajectory.onnx")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(FewstepError, match=r"its file trajectory\.onnx changed: run `fewstep export"):
        open_onnx(exported)
    report = export_source(beside(translated, exported), check_request("onnx"))
    assert not report.reused
    open_onnx(exported)


def test_a_stale_engine_is_not_opened_and_is_made_again(translated: Source, exported: Path) -> None:
    (stale,) = (exported / "engines").iterdir()
    train_again(exported)
    with pytest.raises(FewstepError, match="was built from other weights or for other times: run `fewstep export"):
        open_onnx(exported)
    trained = beside(translated, exported)
    trained.key = read_card(exported).engine_key(1)
    report = export_source(trained, check_request("onnx"))
    assert not report.reused
    assert [report.folder] == list((exported / "engines").iterdir()) != [stale]


def test_an_engine_of_another_student_is_not_opened(exported: Path, tmp_path: Path) -> None:
    other = train_again(tmp_path / "other")
    linked_copy(exported / "engines", other / "engines")
    with pytest.raises(FewstepError, match="was built from other weights or for other times: run `fewstep export"):
        open_onnx(other)
    assert not find_exports(other, "onnx", 1, read_card(other).engine_key(1))[0]


def train_again(directory: Path) -> Path:
    """Write a student of one step with other weights."""
    torch.manual_seed(1)
    transformer, autoencoder = tiny_transformer(), tiny_autoencoder()
    card = {"kind": "student", "method": "none", "steps": [1], "times": {"1": [1.0, 0.0]}, "guidance": 3.0}
    save_artefact(
        directory, lambda folder: sana.save(folder, transformer, autoencoder), {**card, "sampler": "consistency"}
    )
    return directory
