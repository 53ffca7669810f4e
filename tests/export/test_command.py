"""`fewstep export` to several targets: what is refused or cannot be built does not keep the others."""

import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fewstep.app.cli import app


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def states(outcome: Result) -> list[tuple[str, bool]]:
    """The target of each line, and whether it was there already."""
    return [
        (Path(line.split()[0]).name.split("-")[0], " is up to date: " in line) for line in outcome.stdout.splitlines()
    ]


def test_several_targets_are_exported_in_turn(exported: Path) -> None:
    outcome = export(exported, "--to", "openvino", "--to", "onnx")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert states(outcome) == [("openvino", True), ("onnx", True)]


def test_all_passes_over_what_is_not_installed(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def find_none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find_none)  # torch's own search
    monkeypatch.setitem(sys.modules, "openvino", None)
    outcome = export(exported, "--all")
    assert outcome.exit_code == 0
    assert states(outcome) == [("onnx", True)]
    assert 'fewstep: passed over openvino: openvino is not installed: pip install "fewstep[openvino]"' in outcome.stderr
    assert "fewstep: passed over aoti: aoti compiles C++, and there is no compiler here" in outcome.stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = export(exported, "--all")
    assert "no target can be built here: install one of those libraries" in str(outcome.exception)


def test_a_target_that_fails_does_not_keep_the_next(changeable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(next((changeable / "engines").glob("onnx-*")))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    outcome = export(changeable, "--to", "onnx", "--to", "openvino")
    assert outcome.exit_code == 2
    assert outcome.stderr == 'fewstep: onnxscript is not installed: pip install "fewstep[onnx]"\n'
    assert states(outcome) == [("openvino", True)]


def test_an_unknown_target_is_refused_before_any_is_built(student: Path) -> None:
    outcome = export(student, "--to", "onnx", "--to", "tpu")
    assert "unknown export target 'tpu'" in str(outcome.exception)
    assert "--all exports to every target" in str(export(student, "--to", "onnx", "--all").exception)
    assert not (student / "engines").exists()
