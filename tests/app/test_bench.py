"""`fewstep bench`: who takes part, and what is written down."""

import json
from pathlib import Path

import pytest

from fewstep.app.bench.contenders import contenders
from fewstep.app.bench.engine_table import available

pytestmark = pytest.mark.usefixtures("text")


def test_every_model_is_opened_once(student: Path, teacher: Path) -> None:
    listed = contenders(student, teacher)
    assert listed[0].label == "teacher, 50 steps dpm++2m"
    assert listed[-1].label == "student, 1 step, torch"  # it was exported to no other engine
    assert len(listed) == 10
    assert len({contender.pipeline for contender in listed}) == 2


def test_a_benchmark_says_who_drew_how_fast(run, student: Path, teacher: Path, tmp_path: Path) -> None:
    outcome = run("bench", student, "--teacher", teacher, "--rounds", 1, "--out", tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert rows[0]["speedup_batch_1"] == 1
    assert [(row["kind"], row["engine"]) for row in rows] == [("teacher", "torch")] * 9 + [("student", "torch")]
    drawings = {(row["weights"], row["steps"], row["sampler"], row["guidance"]) for row in rows}
    assert len(drawings) == len(rows)
    assert all(row["milliseconds_batch_8"] >= row["engine_milliseconds_batch_8"] > 0 for row in rows)
    assert rows[-1]["label"] in outcome.out


def test_every_engine_is_measured_in_a_process_of_its_own(run, student: Path, tmp_path: Path) -> None:
    outcome = run("bench", student, "--engines", "--rounds", 1, "--out", tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    rows = json.loads((tmp_path / "engines.json").read_text())["rows"]
    assert [row.pop("engine") for row in rows] == list(available(student))
    assert all(value > 0 for row in rows for value in row.values())
    assert all(row["peak_mebibytes"] > 50 for row in rows)


def test_a_table_of_engines_is_of_a_student(run, teacher: Path) -> None:
    outcome = run("bench", teacher, "--engines")
    assert (outcome.code, outcome.err) == (2, f"fewstep: {teacher} is a teacher: give the directory of its student\n")
