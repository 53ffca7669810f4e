"""`fewstep evaluate` and `fewstep report`: scores beside a teacher's, then tables and pictures of several models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.app.pareto import front
from fewstep.app.report import network_evaluations, training_cost
from fewstep.app.tables import Column, markdown_table
from fewstep.runtime.artefact import read_card


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve captioned pictures, 8x8."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    for number in range(12):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return tmp_path / "data"


def scored(model: Path, copy: Path, **changes: object) -> Path:
    """A copy of the model with an evaluation as `fewstep evaluate` writes it."""
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("evaluation"))
    entry = {
        "fd": 100.0,
        "kid": 0.1,
        "precision": 0.5,
        "recall": 0.4,
        "coverage": 0.6,
        "match_at_1": 0.25,
        "diversity": 0.2,
        "images": 400,
        "real_images": 400,
        "seed": 0,
        "split": "train",
        "data": "d" * 64,
        "feature_identity": "f" * 64,
        "weights": read_card(copy).weights,
        "steps": 1,
        "sampler": "consistency",
        "guidance": 3.0,
        "engine": "torch",
    } | changes
    add(copy, entry)
    return copy


def add(model: Path, entry: dict[str, object]) -> None:
    (model / "evaluation").mkdir(exist_ok=True)
    (model / "evaluation" / f"{len(list(model.glob('evaluation/*')))}.json").write_text(json.dumps(entry))


@pytest.mark.usefixtures("text")
def test_a_student_is_evaluated_beside_its_teacher_once(
    run, student: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    models = [shutil.copytree(model, tmp_path / name) for model, name in ((student, "student"), (teacher, "teacher"))]
    command = ["evaluate", models[0], "--data", data, "--against", models[1], "--count", 12, "--engine", "torch"]
    outcome = run(*command)
    assert (outcome.code, outcome.err) == (0, "")
    assert "teacher, 50 steps euler" in outcome.out
    assert "FD-EffLite0 is left out: of 12 images" in outcome.out
    entries = [json.loads(next(model.glob("evaluation/*.json")).read_text()) for model in models]
    row = next(line.split() for line in outcome.out.splitlines() if line.strip().startswith("diversity"))
    assert row == ["diversity", *(f"{entry['diversity']:.3f}" for entry in entries), row[3]]
    assert float(row[3]) == pytest.approx(entries[0]["diversity"] / entries[1]["diversity"], abs=0.02)
    record = next(models[1].glob("evaluation/*.json"))
    written = record.stat().st_mtime_ns
    assert "teacher, generate" not in run(*command).out
    assert record.stat().st_mtime_ns == written


def test_a_report_shows_what_may_be_compared(run, student: Path, teacher: Path, tmp_path: Path) -> None:
    slow = scored(teacher, tmp_path / "slow", sampler="ddim", steps=4, fd=90.0)
    add(slow, json.loads((slow / "evaluation" / "0.json").read_text()) | {"steps": 2, "fd": 123.0, "match_at_1": 0.1})
    quick = scored(student, tmp_path / "quick")
    add(quick, json.loads((quick / "evaluation" / "0.json").read_text()) | {"split": "validation", "fd": None})
    add(
        quick,
        json.loads((quick / "evaluation" / "0.json").read_text()) | {"weights": "of an earlier training", "fd": 7},
    )
    (quick / "training").mkdir()
    (quick / "training" / "curve.jsonl").write_text('{"step": 20, "seconds": 30}\n{"step": 40, "seconds": 120}\n')
    timing = {"weights": read_card(quick).weights, "steps": 1, "sampler": "consistency", "guidance": 3.0}
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"rows": [timing | {"engine": "torch", "milliseconds_batch_1": 12.34}]}))

    outcome = run("report", quick, slow, "--bench", bench, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["pareto-1.png", "pareto-2.png", "report.md"]
    text = (tmp_path / "out" / "report.md").read_text()
    train, validation = text.split("## ")[1:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in train.splitlines() if line.startswith("| ")]
    assert [row[:7] for row in rows[2:]] == [
        ["slow", "none", "2", "ddim", "torch", "4", "123.0"],
        ["slow", "none", "4", "ddim", "torch", "8", "90.0"],
        ["quick", "none", "1", "consistency", "torch", "1", "100.0"],
    ]
    assert rows[2][-3:] == ["", "", ""]
    assert rows[4][-3:] == ["40", "2", "12.3"]
    assert "FD-EffLite0" not in validation
    for number in (1, 2):
        with Image.open(tmp_path / "out" / f"pareto-{number}.png") as picture:
            assert picture.width == {1: 1200, 2: 600}[number]


def test_a_report_needs_evaluations_of_these_weights(run, student: Path, tmp_path: Path) -> None:
    stale = scored(student, tmp_path / "stale", weights="of an earlier training")
    outcome = run("report", stale)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{stale} holds no evaluation of its weights: run `fewstep evaluate" in outcome.err


@pytest.mark.parametrize("content", ["[]", '{"fd": 1.0}'])
def test_a_report_refuses_what_is_no_evaluation(run, student: Path, tmp_path: Path, content: str) -> None:
    model = scored(student, tmp_path / "model")
    (model / "evaluation" / "other.json").write_text(content)
    outcome = run("report", model)
    assert (outcome.code, outcome.out) == (2, "")
    assert "other.json is not an evaluation: remove it" in outcome.err


def test_a_report_refuses_another_benchmark(run, student: Path, tmp_path: Path) -> None:
    model = scored(student, tmp_path / "model")
    (tmp_path / "bench.json").write_text('{"rows": [{"label": "student"}]}')
    outcome = run("report", model, "--bench", tmp_path / "bench.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "bench.json is not what this version of `fewstep bench` writes" in outcome.err


def test_the_front_holds_what_nothing_cheaper_beats() -> None:
    points = [(4.0, 0.5), (1.0, 0.2), (2.0, 0.2), (4.0, 0.4), (8.0, 0.5), (16.0, 0.6)]
    assert front(points) == [(1.0, 0.2), (4.0, 0.5), (16.0, 0.6)]
    assert front([(cost, -score) for cost, score in points], sign=-1) == [(1.0, -0.2), (4.0, -0.5), (16.0, -0.6)]
    assert front([]) == []


@pytest.mark.parametrize(
    ("kind", "steps", "sampler", "guidance", "expected"),
    [
        ("teacher", 50, "dpm++2m", 3.0, 100),
        ("teacher", 50, "dpm++2m", 1.0, 50),
        ("teacher", 4, "heun", 3.0, 14),
        ("student", 2, "consistency", 3.0, 2),
    ],
)
def test_guidance_and_heun_cost_evaluations(
    kind: str, steps: int, sampler: str, guidance: float, expected: int
) -> None:
    assert network_evaluations(kind, steps, sampler, guidance) == expected


def test_stages_of_a_training_add_up(tmp_path: Path) -> None:
    assert training_cost(tmp_path) == {}
    for stage, steps in (("first", 100), ("second", 50)):
        (tmp_path / "training" / stage).mkdir(parents=True)
        (tmp_path / "training" / stage / "curve.jsonl").write_text(f'{{"step": {steps}, "seconds": 60}}\n')
    assert training_cost(tmp_path) == {"iterations": 150, "minutes": 2}
    # A teacher's autoencoder lies beside its own curve and is not its training.
    (tmp_path / "training" / "curve.jsonl").write_text('{"step": 7, "seconds": 6}\n')
    assert training_cost(tmp_path) == {"iterations": 7, "minutes": 0.1}


def test_blank_columns_are_left_out_of_a_table() -> None:
    columns = (Column("a", "a", "{:.1f}"), Column("gone", "gone"), Column("c", "c"))
    rows = [{"a": 1.25, "gone": None, "c": "x|y"}, {"c": "z"}]
    assert markdown_table(columns[1:], rows) == "| c |\n| --- |\n| x\\|y |\n| z |\n"
    assert markdown_table(columns, rows).splitlines()[2:] == ["| 1.2 | x\\|y |", "|  | z |"]
