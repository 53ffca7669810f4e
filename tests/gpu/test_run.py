"""What `make gpu` does, as far as that can be seen without a GPU."""

import json
import sys
from pathlib import Path

import pytest
import run
import torch
from end_to_end import VARIANTS
from students import STUDENTS

SUITE = """
import pytest

def test_good(record_property): record_property("ms", 7)
def test_bad(): assert False
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken(): raise RuntimeError
def test_broken(broken): pass
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.main(tmp_path / "results") == 0
    assert capfd.readouterr().out == "no CUDA device here: nothing was checked, nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_outcomes_of_tests_are_kept_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    found = run.run_tests(["-m", "pytest", "-q", "-c", "/dev/null", str(tmp_path)], 60)
    assert found is not None
    assert found["counts"] == {"passed": 1, "failure": 1, "skipped": 1, "error": 1}
    assert {name.split("::")[-1]: outcome for name, outcome in found["outcomes"].items()} == {
        "test_good": "passed",
        "test_bad": "failure",
        "test_left_out": "skipped",
        "test_broken": "error",
    }
    assert run.failures(found) == 2
    assert {name.split("::")[-1]: values for name, values in found["noted"].items()} == {"test_good": {"ms": "7"}}


def test_what_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import pathlib, time; time.sleep(1.5); pathlib.Path('late').touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = run.begin(["-c", f"import os; os.chdir({str(tmp_path)!r}); {parent}"], quiet=True)
    assert run.finish(process, 0.5) is None
    assert process.poll() is not None
    run.finish(run.begin(["-c", "import time; time.sleep(1.5)"], quiet=True), 60)
    assert not (tmp_path / "late").exists()


def test_sections_run_in_this_interpreter_and_find_the_scripts(capfd: pytest.CaptureFixture[str]) -> None:
    assert run.finish(run.begin(["-c", "import sys, timeline; print(sys.executable)"]), 60) == 0
    assert capfd.readouterr().out.splitlines()[-1] == sys.executable
    assert run.finish(run.begin(["-c", "raise SystemExit(3)"], quiet=True), 60) == 3


def test_every_section_has_its_time_and_all_end_within_eight_minutes() -> None:
    assert list(run.UNTIL) == ["tests", *run.MEASUREMENTS]
    assert list(run.UNTIL.values()) == sorted(run.UNTIL.values())
    assert max(run.UNTIL.values()) + 2 * run.GRACE < 480


@pytest.mark.parametrize("arguments", [*run.MEASUREMENTS.values(), run.PREPARATIONS[0], run.PREPARATIONS[-1]])
def test_every_section_knows_its_arguments(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    given = [] if "--prepare" in arguments else ["--out", "none.json", "--seconds", "1"]
    assert run.finish(run.begin([*arguments, *given, "--help"]), 60) == 0
    assert "--seconds" in capfd.readouterr().out


def test_everything_that_is_compiled_is_prepared() -> None:
    prepared, measured = (
        {(variant.kernels, variant.compiled) for variant in variants}
        for variants in ([VARIANTS[name] for name in run.COMPILED], VARIANTS.values())
    )
    assert prepared == {way for way in measured if way[1]}
    assert {arguments[-2] for arguments in run.PREPARATIONS if arguments[-1] in run.COMPILED} == set(STUDENTS)


def test_a_device_names_a_folder() -> None:
    assert run.slug("NVIDIA H200 (141 GB)") == "nvidia-h200-141-gb"
    assert run.installed("torch") == torch.__version__
    assert run.installed("no-such-package") is None
    json.dumps(run.UNTIL)
