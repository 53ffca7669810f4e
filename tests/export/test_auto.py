"""`auto` measures once, remembers what for, and says why."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.runtime.engines.auto import KEPT, LONGEST, ROUNDS, take_turns
from fewstep.runtime.engines.others import Others
from fewstep.runtime.engines.threads import thread_counts
from fewstep.runtime.pipeline import Pipeline

from .conftest import copy


@pytest.fixture
def directory(exported_to_onnx: Path, tmp_path: Path) -> Path:
    """The student with an ONNX engine; what other tests exported or measured beside it is left out."""
    directory = copy(exported_to_onnx, tmp_path / "student")
    for path in (directory / "engines").glob("*"):
        if not path.name.startswith("onnx-fp32-1step-"):
            path.rename(tmp_path / path.name)
    return directory


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run beside these."""
    monkeypatch.setattr(Others, "disturb", lambda self: False)


def engine_folder(directory: Path) -> Path:
    (folder,) = (directory / "engines").glob("onnx-*")
    return folder


def remembered(directory: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((directory / "engines" / "auto.json").read_text(encoding="utf-8"))
    return entries


def claim(directory: Path, chosen: str) -> None:
    """Let the file say that something else was the fastest."""
    entries = remembered(directory)
    for entry in entries:
        entry["choice"]["chosen"] = chosen
    (directory / "engines" / "auto.json").write_text(json.dumps(entries), encoding="utf-8")


def test_the_first_start_measures_all_and_says_why(directory: Path) -> None:
    pipeline = Pipeline.from_pretrained(directory)
    (entry,) = remembered(directory)
    choice, name = entry["choice"], engine_folder(directory).name
    assert set(choice["milliseconds"]) == {"torch", name}
    assert choice["milliseconds"][choice["chosen"]] == min(choice["milliseconds"].values()) > 0
    assert pipeline.engine_name == choice["chosen"].split("-")[0] == pipeline.generate("a cat").engine
    for candidate, milliseconds in choice["milliseconds"].items():
        assert f"{candidate} {milliseconds:.1f} ms" in pipeline.engine_reason
    assert entry["circumstances"]["threads"] == [choice["threads"]] == [torch.get_num_threads()]
    assert Pipeline.from_pretrained(directory, "torch").engine_reason == ""


@pytest.mark.usefixtures("nobody_said")
def test_auto_chooses_threads_with_the_engine_and_remembers_both(directory: Path) -> None:
    pipeline, counts = Pipeline.from_pretrained(directory), thread_counts()
    (entry,) = remembered(directory)
    choice = entry["choice"]
    assert entry["circumstances"]["threads"] == list(counts)
    assert torch.get_num_threads() == choice["threads"]
    if len(counts) > 1:
        times = choice["by_threads"]
        assert list(times) == [str(count) for count in counts]
        assert times[str(choice["threads"])] == min(times.values()) > 0
        assert f"then with {counts[0]} threads {times[str(counts[0])]:.1f} ms, " in pipeline.engine_reason
    for count in counts:
        entry["choice"]["threads"] = count
        (directory / "engines" / "auto.json").write_text(json.dumps([entry]), encoding="utf-8")
        Pipeline.from_pretrained(directory)
        assert torch.get_num_threads() == count
    assert remembered(directory) == [entry]


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_the_next_start_follows_the_file_and_measures_nothing(directory: Path, engine: str) -> None:
    Pipeline.from_pretrained(directory)
    claim(directory, "torch" if engine == "torch" else engine_folder(directory).name)
    before = (directory / "engines" / "auto.json").read_bytes()
    assert Pipeline.from_pretrained(directory).engine_name == engine
    assert (directory / "engines" / "auto.json").read_bytes() == before


def test_other_circumstances_are_measured_anew_and_both_are_kept(directory: Path) -> None:
    Pipeline.from_pretrained(directory)
    claim(directory, "neither")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        Pipeline.from_pretrained(directory)
    finally:
        torch.set_num_threads(threads)
    entries = remembered(directory)
    assert [entry["circumstances"]["threads"] for entry in entries] == [[threads], [threads + 1]]
    assert entries[1]["choice"]["chosen"] in ("torch", engine_folder(directory).name)


def test_the_file_does_not_grow_without_bound(directory: Path) -> None:
    Pipeline.from_pretrained(directory)
    (entry,) = remembered(directory)
    others = [{**entry, "circumstances": {"weights": str(number)}} for number in range(KEPT)]
    (directory / "engines" / "auto.json").write_text(json.dumps(others), encoding="utf-8")
    Pipeline.from_pretrained(directory)
    assert [found["circumstances"] for found in remembered(directory)][-2:] == [
        others[-1]["circumstances"],
        entry["circumstances"],
    ]
    assert len(remembered(directory)) == KEPT


def test_an_engine_that_was_damaged_since_is_passed_over(directory: Path) -> None:
    Pipeline.from_pretrained(directory)
    claim(directory, engine_folder(directory).name)
    (engine_folder(directory) / "trajectory.onnx").unlink()
    pipeline = Pipeline.from_pretrained(directory)
    assert pipeline.engine_name == "torch"
    assert "passed over: the engine in" in pipeline.engine_reason
    assert "lacks its file trajectory.onnx" in pipeline.engine_reason


@pytest.mark.parametrize("content", ["{", "[]", '[{"circumstances": {}}]', '{"a": 1}', "[1]"])
def test_a_file_that_says_nothing_is_replaced(directory: Path, content: str) -> None:
    (directory / "engines" / "auto.json").write_text(content, encoding="utf-8")
    Pipeline.from_pretrained(directory)
    assert len(remembered(directory)) == 1


def test_what_was_measured_on_a_busy_machine_is_not_remembered(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(Others, "disturb", lambda self: True)
        assert "others kept the processors busy" in Pipeline.from_pretrained(directory).engine_reason
        assert not (directory / "engines" / "auto.json").exists()
    assert "busy" not in Pipeline.from_pretrained(directory).engine_reason
    assert len(remembered(directory)) == 1


def test_without_an_engine_nothing_is_measured_or_written(student: Path) -> None:
    pipeline = Pipeline.from_pretrained(student)
    assert (pipeline.engine_name, pipeline.engine_reason) == ("torch", "nothing that was exported fits here")
    assert not (student / "engines").exists()


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = take_turns({"slow": lambda: (order.append("slow"), time.sleep(0.01)), "fast": lambda: order.append("fast")})
    assert order == ["slow", "fast"] * (ROUNDS + 1)
    assert times["slow"] >= 10 > times["fast"]


def test_slow_calls_are_not_repeated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, int(LONGEST)))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert take_turns({"slow": lambda: calls.append(1)}) == {"slow": 1000 * LONGEST}
    assert len(calls) < ROUNDS
