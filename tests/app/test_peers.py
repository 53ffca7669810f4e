"""`fewstep bench --peers`: the same work for all, and what becomes of a peer that is missing or fails."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.app.bench.contender import PEER_WORKER, REFERENCE, Contender
from fewstep.app.bench.environments import DONE, REQUIRED, TORCH, python_of
from fewstep.app.bench.peer_table import EQUAL_PSNR, add_comparisons
from fewstep.app.bench.peers import AGAIN, Comparison, save_comparison
from fewstep.app.bench.subjects import student_subject

pytestmark = pytest.mark.usefixtures("text")
PEER = "optimum-onnx"
QUICK = """import sys
import numpy as np
sys.path.insert(0, "{folder}")
from peer_worker import serve
serve(lambda job: lambda prompts: np.zeros((len(prompts), 4, 4, 3), np.uint8), None)
"""
"""A contender that answers as all do, and draws nothing."""


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""


def chosen(comparison: Comparison, *names: str) -> list[Contender]:
    return [contender for contender in comparison.contenders() if contender.name in names]


@pytest.fixture
def comparison(student: Path, tmp_path: Path) -> Comparison:
    return Comparison(student_subject(student), tmp_path / "work", tmp_path / "peers", rounds=2, threads=1)


@pytest.fixture
def empty_environment(comparison: Comparison) -> Path:
    """A peer's environment that runs, but lacks the peer."""
    folder = comparison.environments / PEER
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / DONE).write_text(json.dumps([TORCH, REQUIRED[PEER].library, *REQUIRED[PEER].needs]))
    return folder


def test_stock_diffusers_draws_what_ours_draws(comparison: Comparison) -> None:
    ours, theirs = comparison.measure(chosen(comparison, "torch", REFERENCE), silent)
    assert (ours["name"], theirs["name"], theirs["psnr"]) == ("torch", REFERENCE, EQUAL_PSNR)
    assert ours["psnr"] > 50  # ours rounds halves up, diffusers to even
    assert (ours["fastest_of_ours"], theirs["fastest_of_ours"]) == (True, False)
    for batch in comparison.subject.batches:
        assert ours[f"ratio_batch_{batch}"] == 1
        low, high = theirs[f"ratio_quartiles_batch_{batch}"]
        assert 0 < low <= high
        assert theirs[f"ratio_same_engine_batch_{batch}"] == theirs[f"ratio_batch_{batch}"]
    for row in (ours, theirs):
        assert all(row[name] > 0 for name in ("load_seconds", "first_call_milliseconds", "peak_mebibytes"))


def test_who_is_missing_or_fails_says_so_in_one_line(comparison: Comparison, empty_environment: Path) -> None:
    broken, missing = comparison.measure(chosen(comparison, "optimum-onnx fp32", "optimum-intel fp32"), silent)
    assert broken["reason"] == "ModuleNotFoundError: No module named 'optimum'"
    command = f"python -m fewstep.app.bench.environments {comparison.environments} optimum-intel"
    assert missing["reason"] == f"not installed: run `make peers`, or `{command}`"


def test_an_environment_of_other_versions_is_not_used(empty_environment: Path) -> None:
    assert python_of(empty_environment.parent, PEER) == empty_environment / "bin" / "python"
    (empty_environment / DONE).write_text(json.dumps(["torch==1.0"]))
    assert python_of(empty_environment.parent, PEER) is None


def test_a_worker_that_dies_is_no_traceback(comparison: Comparison) -> None:
    dying = Contender("dying", "torch", chosen(comparison, "torch")[0].job, program=["sh", "-c", "kill -9 $$"])
    (row,) = comparison.measure([dying], silent)
    assert row["reason"] == "the process of dying ended: it may have run out of memory"


def row(name: str, ours: str, seconds: list[float]) -> dict[str, Any]:
    milliseconds = 1000 * float(np.median(seconds))
    return {"name": name, "ours": ours, "seconds": {"1": seconds}, "milliseconds_batch_1": milliseconds}


def test_ratios_are_to_the_fastest_of_ours_and_to_the_same_library(tmp_path: Path) -> None:
    rows = [
        row("torch", "torch", [4.0, 4.0, 4.0, 4.0, 4.0]),
        row("openvino-fp32", "openvino-fp32", [1.0, 1.0, 1.0, 1.0, 2.0]),
        row("bare openvino-fp32", "openvino-fp32", [0.5] * 5),  # the quickest, and yet no engine
        row(REFERENCE, "torch", [2.0, 3.0, 4.0, 5.0, 6.0]),
        {"name": "optimum-onnx fp32", "ours": "onnx-fp32", "reason": "not installed"},
    ]
    compared = {entry["name"]: entry for entry in add_comparisons(rows, [1], tmp_path)}
    assert [name for name, entry in compared.items() if entry.get("fastest_of_ours")] == ["openvino-fp32"]
    assert compared[REFERENCE]["ratio_batch_1"] == 4
    assert compared[REFERENCE]["ratio_quartiles_batch_1"] == [3, 4]  # of 2, 3, 4, 5 and 6/2
    assert compared[REFERENCE]["ratio_same_engine_batch_1"] == 1
    assert "ratio_batch_1" not in compared["optimum-onnx fp32"]


def test_other_pictures_are_no_comparison(tmp_path: Path) -> None:
    for name, value in (("torch", 100), ("diffusers-fp32", 101), ("openvino-fp32", 200)):
        np.save(tmp_path / f"{name}.npy", np.full((8, 4, 4, 3), value, np.uint8))
    names = ("torch", REFERENCE, "openvino-fp32")
    torch, reference, other = add_comparisons([row(name, name, [1.0]) for name in names], [1], tmp_path)
    assert torch["psnr"] == pytest.approx(20 * np.log10(255))
    assert reference["psnr"] == EQUAL_PSNR
    assert other["reason"] == f"it draws other pictures than {REFERENCE}"
    assert "seconds" not in other


def test_subjects_lie_side_by_side(tmp_path: Path) -> None:
    rows = add_comparisons([row("torch", "torch", [1.0, 2.0]), row(REFERENCE, "torch", [2.0, 4.0])], [1], tmp_path)
    rows.append({"name": "optimum-onnx fp32", "ours": "onnx-fp32", "reason": "not | installed"})
    where = {"processor": "CPU avx512_bf16", "cores": 2, "threads": 1, "date": "2026-01-01"}
    entry = {"machine": where, "note": "The work.", "how": "In turns.", "rounds": 2, "rows": rows}
    for name in ("student", "sd-1.5-kl", "student"):
        save_comparison(name, entry, tmp_path)
    assert list(json.loads((tmp_path / "cpu-avx512-bf16.json").read_text())) == ["student", "sd-1.5-kl"]
    page = (tmp_path / "peers.md").read_text()
    assert page.count("| diffusers fp32 | 3000.0 | 2.00 (2.00 to 2.00) | 2.00 |") == 2
    assert "| not \\| installed |" in page
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_one_at_a_time_goes_on_where_it_was_interrupted(comparison: Comparison, tmp_path: Path) -> None:
    alone = replace(comparison, subject=replace(comparison.subject, together=False, batches=(1,)))
    program = tmp_path / "draws.py"
    program.write_text(QUICK.format(folder=PEER_WORKER.parent))
    listed = [replace(chosen(alone, "torch")[0], program=[sys.executable, "-P", program])]
    first, again = alone.measure(listed, silent)
    assert (first["name"], again["name"]) == ("torch", "torch" + AGAIN)
    kept, measured = alone.measure(listed, silent)
    assert kept["seconds"] == first["seconds"]
    assert measured["seconds"] != again["seconds"]


def test_only_students_of_one_step_are_compared(run, four_step_student: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("bench", four_step_student, "--peers", "--out", tmp_path)
    assert outcome.code == 2
    assert outcome.err.endswith("is not a student of one step: peers are compared at one\n")


def test_an_unknown_subject_is_named(run, student: Path) -> None:
    outcome = run("bench", student, "--peers", "--subject", "sdxl")
    said = "fewstep: there is no subject 'sdxl': choose student or sd-1.5-kl or sd-1.5-tiny\n"
    assert (outcome.code, outcome.err) == (2, said)
