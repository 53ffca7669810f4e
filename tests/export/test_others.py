"""Others who use the processors: their time is all time that was used but ours."""

import os
import time
from pathlib import Path

import pytest

from fewstep.runtime.engines.others import Others


def counted(file: Path, used: float, idle: float, stolen: float = 0.0) -> Path:
    """Let the kernel have counted so many seconds."""
    ticks = os.sysconf("SC_CLK_TCK")
    counts = (int(used * ticks), 0, 0, int(idle * ticks), 0, 0, 0, int(stolen * ticks), 0, 0)
    file.write_text(f"cpu  {' '.join(map(str, counts))}\ncpu0 1 2 3 4 5 6 7 8 9 10\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(("used", "own", "expected"), [(1.0, 0.0, False), (3.0, 0.0, True), (12.0, 11.5, False)])
def test_others_are_noticed_by_what_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: float, own: float, expected: bool
) -> None:
    spent = 5.0
    monkeypatch.setattr(os, "times", lambda: (spent, 0.0, 0.0, 0.0, 0.0))
    others = Others(counted(tmp_path / "stat", 100.0, 1000.0))
    spent += own
    counted(tmp_path / "stat", 100.0 + used, 1020.0 - used)
    assert others.disturb() is expected


def test_what_a_virtual_machine_is_denied_counts_as_nobodys(tmp_path: Path) -> None:
    others = Others(counted(tmp_path / "stat", 100.0, 1000.0))
    counted(tmp_path / "stat", 100.5, 1010.0, stolen=10.0)
    assert not others.disturb()


def test_a_system_that_does_not_count_disturbs_nobody(tmp_path: Path) -> None:
    assert not Others(tmp_path / "absent").disturb()


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="this system does not count")
def test_the_kernel_counts_what_this_process_does() -> None:
    others, begin = Others(), time.process_time()
    while time.process_time() < begin + 0.2:
        pass
    whole, used, own = (now - then for now, then in zip(others._seconds(), others._begin, strict=True))
    assert 0.15 < own < 0.5
    assert own - 0.05 < used <= whole + 0.05
