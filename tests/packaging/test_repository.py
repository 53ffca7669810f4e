"""Limits that keep the repository light: short files, no large ones under version control."""

import subprocess
from pathlib import Path

import pytest

MEGABYTE = 1_000_000


def test_no_python_file_is_longer_than_400_lines(root: Path) -> None:
    folders = ("app", "export", "kernels", "runtime", "tests", "training")
    lengths = {
        file.relative_to(root).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for file in (root / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_tracked_files_are_small(root: Path) -> None:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout")
    files = [root / name for name in listing.split("\0") if (root / name).is_file()]
    sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
    assert {name: size for name, size in sizes.items() if size > 15 * MEGABYTE} == {}
    assert sum(sizes.values()) < 45 * MEGABYTE
