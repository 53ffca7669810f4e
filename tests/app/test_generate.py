from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("text")

PROMPT = "a red rocket, fluent 3d style"


def test_a_picture_is_written_and_reported_in_one_line(run, student: Path, tmp_path: Path) -> None:
    file = tmp_path / "rocket.png"
    outcome = run("generate", PROMPT, "--output", file, "--model", student)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{file}: student, 1 step, ")
    assert outcome.out.endswith(" ms an image on torch\n")
    assert list(tmp_path.iterdir()) == [file]
    with Image.open(file) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (8, 8))


def test_one_seed_gives_one_picture(run, student: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.png" for name in ("first", "again", "other")}
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        assert run("generate", PROMPT, "-o", files[name], "--model", student, "--seed", seed).code == 0
    assert files["first"].read_bytes() == files["again"].read_bytes()
    assert files["first"].read_bytes() != files["other"].read_bytes()


def test_several_pictures_are_numbered_and_their_seeds_count_up(run, student: Path, tmp_path: Path) -> None:
    assert run("generate", PROMPT, "-o", tmp_path / "x.png", "--model", student, "--count", 2, "--seed", 7).code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x-1.png", "x-2.png"]
    assert run("generate", PROMPT, "-o", tmp_path / "next.png", "--model", student, "--seed", 8).code == 0
    assert (tmp_path / "next.png").read_bytes() == (tmp_path / "x-2.png").read_bytes()


def test_the_teacher_draws_beside_the_student(run, student: Path, teacher: Path, tmp_path: Path) -> None:
    outcome = run("generate", PROMPT, "-o", tmp_path / "x.png", "--model", student, "--teacher", teacher)
    assert outcome.code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.png", "x.teacher.png"]
    assert "teacher, 50 steps, " in outcome.out
    assert outcome.out.splitlines()[-1].startswith("the student is ")


def test_a_teacher_takes_any_number_of_steps(run, teacher: Path, tmp_path: Path) -> None:
    outcome = run("generate", PROMPT, "-o", tmp_path / "x.png", "--model", teacher, "--steps", 3)
    assert outcome.code == 0
    assert "teacher, 3 steps, " in outcome.out
