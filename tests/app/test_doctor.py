"""`fewstep doctor` says in one sentence each what to install or change, and fails only over what is broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from fewstep.app.findings import Finding, Verdict
from fewstep.app.hardware import Gpu, load_error, torch_build
from fewstep.app.packages import core, extras, loading, overwritten, python
from fewstep.app.processor import threads
from fewstep.runtime.engines.device import usable_processors

from .conftest import Run

CPU = Gpu(driver="", driver_cuda=None, hidden=None, torch="2.13.0", torch_cuda=None)
H200 = Gpu("580.95.05", (13, 0), None, "2.13.0", "13.0", "NVIDIA H200", 90, ("sm_80", "sm_90", "compute_90"))
UNUSABLE = replace(H200, name="", capability=0, architectures=())


def package(folder: Path, name: str, version: str, module: str) -> None:
    """What pip leaves of a package, without its module."""
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "top_level.txt").write_text(f"{module}\n")


def test_this_installation_is_read(run: Run) -> None:
    outcome = run("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("good    python: Python 3.")
    assert {line.split()[0] for line in lines} <= {"good", "absent", "change"}
    found = json.loads(run("doctor", "--json").out)
    assert [f"{entry['verdict']:<6}  {entry['subject']}: {entry['sentence']}" for entry in found] == lines
    assert {"python", "core", "torch", "processor", "threads", "extra text"} <= {entry["subject"] for entry in found}


def test_packages_that_overwrite_each_other_are_broken(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "onnxruntime", "1.31.1", "onnxruntime")
    package(tmp_path, "onnxruntime-gpu", "1.31.1", "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run("doctor")
    assert outcome.code == 1
    sentence = (
        "broken  onnxruntime: onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall onnxruntime "
        "onnxruntime-gpu, then install the one that you want"
    )
    assert sentence in outcome.out.splitlines()


def test_one_package_that_brings_a_module_is_fine() -> None:
    assert list(overwritten({"onnxruntime": ["onnxruntime", "onnxruntime"], "yaml": ["a", "b"]})) == []


def test_a_library_that_does_not_load_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = loading(("json", "half_installed", "not_installed_at_all"))
    assert (found.subject, found.verdict) == ("half_installed", Verdict.BROKEN)
    assert "does not load (libfoo.so.1: cannot open shared object file)" in found.sentence


def test_a_missing_shared_library_is_named(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "empty.c").touch()
    build = [compiler, "-shared", "-fPIC", "-o"]
    subprocess.run([*build, "libneeded.so", "empty.c"], cwd=tmp_path, check=True)
    needs = ["-Wl,--no-as-needed", "-L.", "-lneeded"]
    subprocess.run([*build, "provider.so", "empty.c", *needs], cwd=tmp_path, check=True)
    assert "libneeded.so: cannot open shared object file" in load_error(tmp_path, ["provider.so"])
    assert load_error(tmp_path, ["libneeded.so"]) == ""


def of_version(folder: Path, needs: list[str], extra: str = "") -> None:
    """A fewstep that needs other packages."""
    information = folder / "fewstep-9.dist-info"
    information.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: fewstep", "Version: 9", "Requires-Python: >=3.11"]
    lines += [f"Provides-Extra: {extra}"] if extra else []
    lines += [f"Requires-Dist: {need}" for need in needs]
    (information / "METADATA").write_text("\n".join(lines) + "\n")


def test_a_core_package_of_another_version_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert core().verdict is Verdict.GOOD
    of_version(tmp_path, ["numpy>=999", "pytest-no-such-thing", "pytest>=1"])
    monkeypatch.syspath_prepend(tmp_path)
    found = core()
    assert found.verdict is Verdict.BROKEN
    sentence = f"fewstep lacks pytest-no-such-thing and does not take numpy {metadata.version('numpy')}: run pip"
    assert found.sentence.startswith(sentence)


def test_an_extra_is_absent_without_its_packages_and_broken_with_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [found for found in extras() if found.verdict is Verdict.BROKEN]
    of_version(tmp_path, ["numpy", 'pytest-no-such-thing; extra == "serve"', 'pytest; extra == "serve"'], "serve")
    monkeypatch.syspath_prepend(tmp_path)
    absent = 'it lacks pytest-no-such-thing: pip install "fewstep[serve]"'
    assert list(extras()) == [Finding("extra serve", Verdict.ABSENT, absent)]
    shutil.rmtree(tmp_path / "fewstep-9.dist-info")
    of_version(tmp_path, ['pytest>=999; extra == "serve"'], "serve")
    (found,) = extras()
    assert found.verdict is Verdict.BROKEN
    assert "does not take pytest" in found.sentence


def test_sources_on_the_path_hide_packages(root_on_path: None) -> None:
    found = python()
    assert found.verdict is Verdict.BROKEN
    assert "run python -P" in found.sentence


@pytest.fixture
def root_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(
    ("gpu", "verdict", "sentence"),
    [
        (CPU, Verdict.GOOD, "computes on the CPU, and there is no NVIDIA driver"),
        (replace(CPU, torch_cuda="13.0"), Verdict.ABSENT, "there is no NVIDIA driver: install one to use a GPU"),
        (replace(CPU, driver="580.95.05"), Verdict.CHANGE, "beside the driver 580.95.05: install a build of torch for"),
        (H200, Verdict.GOOD, "and runs on NVIDIA H200, driver 580.95.05"),
        (replace(H200, architectures=("sm_80", "compute_80")), Verdict.GOOD, "runs on NVIDIA H200"),
        (replace(H200, architectures=("sm_90a",)), Verdict.GOOD, "runs on NVIDIA H200"),
        (replace(H200, architectures=("sm_80", "sm_100")), Verdict.BROKEN, r"no code for NVIDIA H200 \(sm_90\)"),
        (replace(UNUSABLE, driver_cuda=(12, 4)), Verdict.BROKEN, "runs CUDA 12.4 at most: update the driver"),
        (replace(UNUSABLE, hidden=""), Verdict.CHANGE, "CUDA_VISIBLE_DEVICES is '': clear it"),
        (UNUSABLE, Verdict.BROKEN, "cannot use the GPU of the driver 580.95.05: see whether nvidia-smi can"),
    ],
)
def test_torch_driver_and_gpu_have_to_fit(gpu: Gpu, verdict: Verdict, sentence: str) -> None:
    found = torch_build(gpu)
    assert found.verdict is verdict
    assert re.search(sentence, found.sentence)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "lets idle threads keep their cores from others: unset it"),
        ({"KMP_BLOCKTIME": "infinite"}, "lets idle threads keep their cores from others: unset it"),
        ({"OMP_PROC_BIND": "close"}, "puts the threads of several processes on the same cores: unset it"),
        ({"OMP_NUM_THREADS": "16"}, "makes 16 threads where there is time on 4 processors: set OMP_NUM_THREADS=4"),
        ({}, "makes 8 threads where there is time on 4 processors: set OMP_NUM_THREADS=4"),
        ({"OMP_NUM_THREADS": "all"}, "is 'all', which is no number of threads: set it to 4"),
        ({"OMP_NUM_THREADS": "1"}, "leaves 3 processors idle"),
    ],
)
def test_settings_of_threads_that_hurt_are_named(environment: dict[str, str], sentence: str) -> None:
    (found,) = threads({"OMP_NUM_THREADS": "4"} | environment if environment else {}, processors=8, granted=4)
    assert found.verdict is Verdict.CHANGE
    assert sentence in found.sentence


def test_settings_of_threads_that_do_not_hurt_are_left_alone() -> None:
    good = {"OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "false", "OMP_NUM_THREADS": "4"}
    for environment in (good, {}):
        assert [found.verdict for found in threads(environment, processors=4, granted=4)] == [Verdict.GOOD]


@pytest.mark.parametrize(("quota", "granted"), [("max 100000", None), ("50000 100000", 1), ("100000000 100000", None)])
def test_a_containers_quota_bounds_the_processors(tmp_path: Path, quota: str, granted: int | None) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    processors, found = usable_processors(tmp_path)
    assert found == (granted or processors)


def test_a_quota_is_rounded_up(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    processors, granted = usable_processors(tmp_path)
    assert granted == min(processors, 2)


def test_the_command_needs_nothing_that_may_be_broken(tmp_path: Path) -> None:
    for module in ("torch", "onnxruntime"):
        (tmp_path / f"{module}.py").write_text(f"raise OSError('{module} lacks libcublas.so.13')")
    program = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    for module in ("torch", "onnxruntime"):
        assert f"broken  {module}: it is installed and does not load ({module} lacks libcublas.so.13)" in done.stdout
    assert "threads: " in done.stdout
