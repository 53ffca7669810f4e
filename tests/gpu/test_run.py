"""What `make gpu` does, as far as that can be seen without a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fewstep.training.teacher import TeacherConfig

from . import run
from .speed import latency, training_speed

CPU, TINY = torch.device("cpu"), TeacherConfig(layers=1, heads=2)
SUITE = """
import pytest

def test_good(): pass
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
    found = run.run_tests(["-m", "pytest", "-q", "-c", "/dev/null", str(tmp_path)])
    assert found is not None
    assert found["counts"] == {"passed": 1, "failure": 1, "skipped": 1, "error": 1}
    assert {name.split("::")[-1]: outcome for name, outcome in found["outcomes"].items()} == {
        "test_good": "passed",
        "test_bad": "failure",
        "test_left_out": "skipped",
        "test_broken": "error",
    }
    assert run.failures(found) == 2


def test_a_measurement_is_the_last_line_or_nothing() -> None:
    assert run.run_measurement(["-c", "print('on the way'); print('[1, 2]')"]) == [1, 2]
    assert run.run_measurement(["-c", "print('[1, 2]'); raise SystemExit(1)"]) is None
    assert run.failures([1, 2]) == 0


def test_what_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECONDS", 0.2)
    assert run.python(["-c", "import time; time.sleep(60)"]) is None


def test_results_are_json_in_a_folder_named_after_the_device(tmp_path: Path) -> None:
    file = tmp_path / run.slug("NVIDIA H200 (141 GB)") / "tests.json"
    run.write(file, {"machine": run.installed("torch"), "tests": [1.5]})
    assert file.parent.name == "nvidia-h200-141-gb"
    assert json.loads(file.read_text()) == {"machine": torch.__version__, "tests": [1.5]}
    assert run.installed("no-such-package") is None


@pytest.mark.parametrize("method", ["flow matching", "dmd2"])
def test_training_is_timed_between_two_iterations(method: str) -> None:
    row = training_speed(method, 2, CPU, TINY, precision="no", warm_up=1, iterations=2)
    assert (row["method"], row["batch"], row["precision"]) == (method, 2, "no")
    assert row["images_per_second"] == pytest.approx(2 * row["iterations_per_second"], abs=0.1)
    assert row["iterations_per_second"] > 0


def test_latency_of_one_picture_is_measured() -> None:
    row = latency(1, 1, CPU, TINY, repeats=3)
    assert row["images_per_second"] == pytest.approx(1000 / row["milliseconds"], rel=0.01)


def test_the_interpreter_is_this_one() -> None:
    assert run.run_measurement(["-c", "import json, sys; print(json.dumps(sys.executable))"]) == sys.executable
