"""`fewstep engines` says what is there and what would be refused, and removes only what it says."""

import shutil
from pathlib import Path

import pytest

from fewstep.runtime.engines.device import Device

from ..stored_engine import GRAPH, store_engine
from .conftest import Run

pytest.importorskip("onnxruntime")


@pytest.fixture
def directory(student: Path, tmp_path: Path) -> Path:
    """A student with an engine that holds, one of other weights and one of another machine."""
    directory = shutil.copytree(student, tmp_path / "fast")
    store_engine(directory, b"x" * 1_000_000)
    store_engine(directory, used=1000.0, precision="bf16", built_from="1" * 64)
    store_engine(directory, used=1e9, steps=2, device=Device("Z80", "", ""))
    return directory


def folders(directory: Path) -> list[str]:
    return sorted(folder.name.rpartition("-")[0] for folder in (directory / "engines").iterdir())


def test_engines_are_listed(run: Run, directory: Path) -> None:
    outcome = run("engines", "list", directory)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines() if line.startswith(" fast")]
    assert [line[:5] for line in lines] == [
        ["fast", "onnx", "fp32", "1", "2.0"],
        ["fast", "onnx", "fp32", "2", "0.0"],
        ["fast", "onnx", "bf16", "1", "0.0"],
    ]
    assert [line[-1] for line in lines] == ["ready", "machine", "stale"]
    assert lines[2][6] == "1970-01-01"


def test_a_student_without_engines_is_no_failure(run: Run, student: Path) -> None:
    for verb in ("list", "verify", "prune"):
        outcome = run("engines", verb, student)
        assert (outcome.code, outcome.err) == (0, "")
    assert run("engines", "list", student).out == "there is no engine: make one with `fewstep export`\n"


def test_what_would_be_refused_is_said_and_fails(run: Run, directory: Path) -> None:
    outcome = run("engines", "verify", directory)
    assert outcome.code == 1
    assert "was built from other weights or for other times\n" in outcome.out
    assert "was built on another machine (Z80)\n" in outcome.out
    assert outcome.out.count("the engine in") == 2
    (next((directory / "engines").glob("onnx-fp32-1step-*")) / GRAPH).write_bytes(b"y")
    assert f"its file {GRAPH} changed\n" in run("engines", "verify", directory).out


def test_engines_that_all_hold_verify(run: Run, directory: Path) -> None:
    run("engines", "prune", directory)
    assert folders(directory) == ["onnx-fp32-1step", "onnx-fp32-2step"]
    assert run("engines", "verify", directory).code == 1  # another machine's, which shares the folder
    assert run("engines", "prune", directory, "--gib", 1e-6).code == 0
    assert folders(directory) == ["onnx-fp32-1step"]
    assert run("engines", "verify", directory).code == 0


def test_a_dry_run_removes_nothing(run: Run, directory: Path) -> None:
    before = sorted(directory.rglob("*"))
    outcome = run("engines", "prune", directory, "--gib", 1e-6, "--dry-run")
    assert sorted(directory.rglob("*")) == before
    said = outcome.out.replace("would go: ", "gone: ")
    assert said.count("gone: ") == 2
    assert "is among the longest unused, beyond 1e-06 GiB" in said
    assert run("engines", "prune", directory, "--gib", 1e-6).out == said


def test_impossible_bounds_and_folders_are_refused(
    run: Run, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no engine fits into 0 GiB: give --gib above 0" in run("engines", "prune", directory, "--gib", 0).err
    assert "there is no model at" in run("engines", "list", tmp_path / "absent").err
    monkeypatch.setenv("FEWSTEP_ENGINES_GIB", "much")
    assert "FEWSTEP_ENGINES_GIB is 'much'" in run("engines", "prune", directory).err
    assert len(folders(directory)) == 3
