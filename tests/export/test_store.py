"""The engines beside a student: bounded in size, changed by one process at a time, and none left by a killed one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.runtime.artefact import read_card
from fewstep.runtime.engines import open_engines
from fewstep.runtime.engines.device import Device
from fewstep.runtime.engines.manifest import State
from fewstep.runtime.engines.store import (
    GIB,
    beyond,
    engines_bound,
    exclusive,
    list_engines,
    remove_engine,
    surplus,
)
from fewstep.runtime.errors import FewstepError

from ..stored_engine import GRAPH, store_engine
from .conftest import copy

pytest.importorskip("onnxruntime")
ELSEWHERE = Device("Z80", "", "")
BUILDER = """
import sys, time
from pathlib import Path
from fewstep.runtime.engines.store import exclusive
from fewstep.runtime.files import atomic_path

directory, folder, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with exclusive(directory), atomic_path(directory / "engines" / folder) as staging:
    staging.mkdir()
    (staging / "trajectory.onnx").write_bytes(b"half")
    time.sleep(seconds)
"""
FOLDER = "onnx-fp32-1step-01234567"


@pytest.fixture
def directory(student: Path, tmp_path: Path) -> Path:
    return copy(student, tmp_path / "student")


def start_builder(directory: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-c", BUILDER, str(directory), FOLDER, str(seconds)]
    builder = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while builder.poll() is None and not list((directory / "engines").glob(".*.part")):
        time.sleep(0.01)
    return builder


def test_engines_are_listed_with_what_they_are_good_for(directory: Path) -> None:
    changed = store_engine(directory, used=5.0)
    store_engine(directory, used=4.0, precision="bf16")
    store_engine(directory, used=3.0, built_from="1" * 64)
    store_engine(directory, used=2.5, format=2)
    store_engine(directory, used=2.0, device=ELSEWHERE)
    store_engine(directory, used=1.0, target="jax")
    (directory / "engines" / FOLDER).mkdir()
    (directory / "engines" / "notes").mkdir()
    (directory / "engines" / "notes.txt").touch()
    os.utime(directory / "engines" / FOLDER, (0, 0))
    (changed / GRAPH).write_bytes(b"grapf")
    quick, thorough = list_engines(directory), list_engines(directory, thorough=True)
    states = [State.READY, State.READY, State.STALE, State.STALE, State.ELSEWHERE, State.UNABLE, State.DAMAGED]
    assert [engine.state for engine in quick] == states
    assert [engine.state for engine in thorough] == [State.DAMAGED, *states[1:]]
    assert [engine.last_used for engine in quick] == [5.0, 4.0, 3.0, 2.5, 2.0, 1.0, 0.0]
    assert quick[0].size == sum(file.stat().st_size for file in changed.iterdir())
    assert [bool(engine.reason) for engine in quick] == [state is not State.READY for state in states]


def test_the_longest_unused_go_beyond_the_bound(directory: Path) -> None:
    folders = [store_engine(directory, b"x" * 2_000_000, used=steps, steps=steps) for steps in (3, 1, 2)]
    engines = list_engines(directory)
    assert [engine.steps for engine in engines] == [3, 2, 1]
    assert not beyond(engines, sum(engine.size for engine in engines))
    assert [engine.steps for engine in beyond(engines, 9_000_000)] == [1]
    assert [engine.steps for engine in beyond(engines, 5_000_000)] == [2, 1]
    assert [engine.steps for engine in beyond(engines, 1)] == [2, 1]  # the most recently used stays
    os.utime(folders[1] / "manifest.json", (9, 9))
    assert [engine.steps for engine in beyond(list_engines(directory), 5_000_000)] == [3, 2]


def test_what_cannot_be_used_again_is_surplus_but_not_another_machines(directory: Path) -> None:
    store_engine(directory, used=1.0)
    kept = store_engine(directory, used=2.0, precision="bf16", device=ELSEWHERE)
    stale = store_engine(directory, used=3.0, steps=2, library="onnxruntime 0.1")
    changed = store_engine(directory, used=4.0, steps=4)
    (changed / GRAPH).write_bytes(b"grapf")
    assert {engine.folder for engine in surplus(directory, GIB)} == {stale, changed}
    going = surplus(directory, 1)
    assert {engine.folder.name for engine in going} & {kept.name} == set()
    assert len(going) == 3
    for engine in going:
        remove_engine(engine.folder)
    assert [file.name for file in (directory / "engines").iterdir()] == [kept.name]


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan"])
def test_an_impossible_bound_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FEWSTEP_ENGINES_GIB", text)
    with pytest.raises(FewstepError, match=f"FEWSTEP_ENGINES_GIB is '{text}', which is no size: set it to the GiB"):
        engines_bound()


def test_the_bound_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_ENGINES_GIB", "0.5")
    assert engines_bound() == GIB / 2
    monkeypatch.delenv("FEWSTEP_ENGINES_GIB")
    assert engines_bound() == 16 * GIB


def test_the_second_waits_for_the_first(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    builder = start_builder(directory, seconds=0.5)
    with exclusive(directory):
        assert (directory / "engines" / FOLDER / GRAPH).is_file()  # the first is done
    builder.communicate(timeout=60)
    assert builder.returncode == 0
    assert capfd.readouterr().err == f"fewstep: waiting for another process that changes the engines of {directory}\n"


def test_a_killed_builder_leaves_no_engine_and_its_leftovers_go(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    builder = start_builder(directory, seconds=600)
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=60)
    assert list((directory / "engines").glob(".*.part"))
    (directory / "engines" / f".{FOLDER}.1.part").touch()  # a file may be left by the same name
    assert list_engines(directory) == []
    with pytest.raises(FewstepError, match="has no onnx engine for 1 step"):
        open_engines(directory, "onnx", 1, read_card(directory).engine_key(1))
    with exclusive(directory):
        assert list((directory / "engines").iterdir()) == []
    assert capfd.readouterr().err == ""  # the kernel has freed the lock
