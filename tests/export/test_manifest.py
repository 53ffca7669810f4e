"""An engine is refused by one sentence unless everything that its manifest says holds here and now."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.runtime.artefact import read_card
from fewstep.runtime.engines import engine_module, open_engines
from fewstep.runtime.engines.device import driver_version, this_device
from fewstep.runtime.engines.manifest import State, mismatch, read_manifest, refusal, touch, write_manifest
from fewstep.runtime.errors import FewstepError

from ..stored_engine import GRAPH, change_manifest, make_manifest, store_engine
from .conftest import copy

pytest.importorskip("onnxruntime")
THIS = this_device()


@pytest.fixture
def directory(student: Path, tmp_path: Path) -> Path:
    return copy(student, tmp_path / "student")


def refused(directory: Path, folder: Path) -> str:
    key = read_card(directory).engine_key(1)
    return refusal(folder, read_manifest(folder), key, engine_module("onnx").library())


def test_what_was_written_is_read(directory: Path) -> None:
    folder = store_engine(directory, sensitive={"trajectory": {"softmax": ["node_1"]}})
    manifest = read_manifest(folder)
    assert (manifest.draws, manifest.sample_shape) == (1, (4, 4, 4))
    assert manifest.device == THIS
    assert manifest.folder_name == folder.name
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert refused(directory, folder) == ""


@pytest.mark.parametrize(
    "changed",
    [
        {"built_from": "1" * 64},
        {"graphs": {"trajectory": "1" * 64}},
        {"shapes": {"trajectory": {"noise": ["batch", 1, 4, 8, 8]}}},
        {"precision": "bf16"},
        {"kernels": {"rotary": "00000000"}},
        {"library": "onnxruntime 0.1"},
        {"device": replace(THIS, driver="1.0")},
        {"device": replace(THIS, name="Z80")},
        {"device": replace(THIS, capability="1.0")},
    ],
)
def test_the_key_differs_with_all_that_an_engine_is_built_from_and_for(
    directory: Path, changed: dict[str, Any]
) -> None:
    key = make_manifest(directory).folder_name.rpartition("-")[2]
    assert make_manifest(directory, **changed).folder_name.rpartition("-")[2] != key


def test_the_key_does_not_differ_with_what_came_out(directory: Path) -> None:
    came_out = {"files": {"x": "1"}, "milliseconds": {"engine": 9.0, "torch": 9.0}, "sensitive": {"trajectory": {}}}
    assert make_manifest(directory, **came_out).folder_name == make_manifest(directory).folder_name


@pytest.mark.parametrize(
    ("changed", "sentence", "state"),
    [
        ({"built_from": "1" * 64}, "built from other weights or for other times", State.STALE),
        ({"library": "onnxruntime 0.1"}, "built with onnxruntime 0.1, and this is onnxruntime ", State.STALE),
        ({"device": replace(THIS, name="Z80")}, r"built on another machine \(Z80\)", State.ELSEWHERE),
        (
            {"device": replace(THIS, driver="1.0")},
            "for NVIDIA driver 1.0 at .*, and here is NVIDIA driver",
            State.STALE,
        ),
        ({"kernels": {"torch": "1.0", "rotary": "00000000"}}, "other versions of .*rotary.*torch", State.STALE),
    ],
)
def test_what_does_not_hold_here_is_refused(
    directory: Path, changed: dict[str, Any], sentence: str, state: State
) -> None:
    folder = store_engine(directory, **changed)
    with pytest.raises(FewstepError, match=rf"{sentence}.*: run `fewstep export {directory} --to onnx --steps 1`$"):
        open_engines(directory, "onnx", 1, read_card(directory).engine_key(1))
    manifest, library = read_manifest(folder), engine_module("onnx").library()
    assert mismatch(folder, manifest, read_card(directory).engine_key(1), library)[0] is state


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"format": 2}, "was exported by another version of fewstep"),
        ({"files": {}}, "lacks or misstates its times or files"),
        ({"milliseconds": {"engine": 1.0}}, "lacks or misstates 'torch'"),
        ({"milliseconds": {"engine": 0.0, "torch": 1.0}}, "lacks or misstates its times or files"),
        ({"kernels": []}, "lacks or misstates what should be a table"),
        ({"shapes": {"trajectory": {"noise": ["batch", 1]}}}, "lacks or misstates not enough values"),
        ({"device": "Z80"}, "lacks or misstates .*Device"),
        ({"built_from": "1" * 64}, "lacks or misstates what its folder is named for"),
        ({"library": "onnxruntime 0.1"}, "lacks or misstates what its folder is named for"),
        ({"unknown": 1}, "lacks or misstates .*unknown"),
    ],
)
def test_a_manifest_that_is_not_the_folders_is_refused(directory: Path, changed: dict[str, Any], sentence: str) -> None:
    path = store_engine(directory) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(FewstepError, match=rf"{sentence}.*: run `fewstep export"):
        open_engines(directory, "onnx", 1, read_card(directory).engine_key(1))


def test_half_an_engine_is_refused(directory: Path) -> None:
    path = store_engine(directory) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FewstepError, match=r"manifest\.json is not valid JSON"):
        open_engines(directory, "onnx", 1, read_card(directory).engine_key(1))
    path.unlink()
    with pytest.raises(FewstepError, match=r"lacks its manifest\.json: run `fewstep export"):
        open_engines(directory, "onnx", 1, read_card(directory).engine_key(1))


def test_foreign_missing_and_changed_files_are_named(directory: Path) -> None:
    folder = store_engine(directory)
    (folder / "text_encoder.onnx").write_bytes(b"somebody else's")
    assert refused(directory, folder).endswith("it holds the foreign file text_encoder.onnx")
    (folder / "text_encoder.onnx").unlink()
    (folder / GRAPH).write_bytes(b"grapf")
    assert refused(directory, folder).endswith(f"its file {GRAPH} changed")
    (folder / GRAPH).unlink()
    assert refused(directory, folder).endswith(f"lacks its file {GRAPH}")


def test_a_use_is_noted_without_writing(directory: Path) -> None:
    folder = store_engine(directory, used=1000.0)
    before = (folder / "manifest.json").read_bytes()
    touch(folder)
    assert (folder / "manifest.json").stat().st_mtime > 1000
    assert (folder / "manifest.json").read_bytes() == before
    touch(folder.with_name("absent"))  # a folder that cannot be touched is used all the same


def test_a_renamed_folder_is_what_its_new_manifest_says(directory: Path) -> None:
    folder = change_manifest(store_engine(directory), library="onnxruntime 0.1")
    assert "was built with onnxruntime 0.1" in refused(directory, folder)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n", "570.86.15"),
        ("", ""),
    ],
)
def test_the_drivers_version_is_read(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "absent") == ""
