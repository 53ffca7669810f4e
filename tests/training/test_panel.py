"""The panel of predictions: a row for every network, the same each time, and training does not notice it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from fewstep.runtime.denoiser import Denoiser
from fewstep.runtime.families import Model, sana
from fewstep.runtime.schedule import Flow
from fewstep.training.batches import LatentBatches
from fewstep.training.copies import FullCopies, LoRACopies
from fewstep.training.data.packed import CaptionedImages
from fewstep.training.latents import LatentData
from fewstep.training.method import Stage, Task
from fewstep.training.methods import METHODS, get_method
from fewstep.training.pairs import PairsConfig
from fewstep.training.panel import COUNT, NOISE_LEVELS, show_predictions
from fewstep.training.text_cache import TextCache
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig

from ..tiny_models import tiny_transformer

CPU = torch.device("cpu")
FEW: dict[str, Any] = {"pairs": PairsConfig(count=2, solver_steps=2), "teacher_steps": 8, "perceptual_weight": 0.0}
SIDE = 8 + 2
"""Of a picture in the grid, in pixels."""
NETWORKS = {
    "dmd2": ["teacher", "fake score"],
    "progressive": ["teacher", "student", "round's teacher"],
    "rectified-flow": ["teacher", "student"],
    "rectified-flow-plus": ["teacher", "student"],
    "lcm": ["teacher", "student", "target"],
    "consistency": ["teacher", "student", "target"],
    "scott": ["teacher", "student", "target"],
}


class Decoder(nn.Module):
    """Latents (B, 4, 4, 4) to images (B, 3, 8, 8)."""

    def forward(self, latents: Tensor) -> Tensor:
        return functional.interpolate(latents[:, :3].sigmoid(), scale_factor=2)


@dataclass(frozen=True)
class Training:
    """A task on a tiny teacher and its data."""

    task: Task
    data: LatentData

    def stages(self, method: str, **changes: Any) -> Iterator[Stage]:
        config = get_method(method).Config()
        few = {name: value for name, value in FEW.items() if hasattr(config, name)}
        return get_method(method).stages(self.task, replace(config, **few, **changes))

    def show(self, stage: Stage) -> Path:
        path = self.task.folder / "predictions.png"
        show_predictions(stage, self.task, self.data, path)
        return path


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., Training]:
    """Two-step students of the same teacher each time: `training(rank=0, guidance=2.0)`."""

    def make(rank: int = 0, guidance: float = 2.0) -> Training:
        torch.manual_seed(0)
        network = tiny_transformer().eval().requires_grad_(False)
        denoiser = Denoiser(sana.network_call(network), Flow(), "flow_prediction")
        unused = nn.Identity()
        model = Model(network, denoiser, unused, unused, (4, 4, 4), lambda: None)  # type: ignore[arg-type,return-value]
        states = {"encoder_hidden_states": torch.randn(3, 5, 384), "encoder_attention_mask": torch.ones(3, 5)}
        text = TextCache(states, torch.arange(4), torch.arange(3))
        batches = LatentBatches(torch.randn(3, 4, 4, 4), text, 2, 0, CPU)
        negative = {name: value[:1] for name, value in states.items()}
        images = CaptionedImages(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), (("",),) * 3, ("",) * 3, ("",) * 3, "")
        copies = LoRACopies(model, sana, rank) if rank else FullCopies(model, sana)
        block = sana.feature_block
        task = Task(denoiser, negative, guidance, 2, (4, 4, 4), batches, copies, block, Decoder(), tmp_path, CPU)
        return Training(task, LatentData(batches, Decoder(), negative, images))

    return make


def rows_of(path: Path) -> Tensor:
    """(rows, 8, columns * 10, 3) pixels of a panel, without the names and the space under each row."""
    pixels = torch.from_numpy(numpy.array(Image.open(path)))[:, -COUNT * SIDE :]
    return pixels.unflatten(0, (-1, SIDE))[:, :8]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_row_for_each_network_and_level(method: str, training: Callable[..., Training]) -> None:
    here = training()
    *_, stage = here.stages(method)
    rows = rows_of(here.show(stage))
    assert rows.shape == (1 + len(NOISE_LEVELS) * len(NETWORKS[method]), 8, COUNT * SIDE, 3)
    assert set(stage.panel or {"student"}) == set(NETWORKS[method]) - {"teacher"}


def test_a_student_of_a_guidance_range_is_told_a_scale_and_the_teacher_is_not(
    training: Callable[..., Training],
) -> None:
    here = training()
    stage = next(here.stages("lcm", guidance_range=(2.0, 6.0)))
    assert len(rows_of(here.show(stage))) == 10


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_rows_are_predictions_of_the_same_noised_samples(rank: int, training: Callable[..., Training]) -> None:
    """An unguided teacher and the fake score, its copy at first, agree; then the fake score alone goes astray."""
    here = training(rank, guidance=1.0)
    stage = next(here.stages("dmd2"))
    before = rows_of(here.show(stage))
    teacher, fake = before[1::2], before[2::2]
    assert torch.equal(teacher, fake)
    assert not any(torch.equal(one, other) for one, other in pairwise(teacher))
    with torch.no_grad():
        for weight in stage.phases[0].module["fake"].parameters():  # type: ignore[index]
            weight.add_(0.1 * torch.randn_like(weight))
    after = rows_of(here.show(stage))
    assert torch.equal(after[1::2], teacher)
    assert torch.equal(after[0], before[0])
    assert not any(torch.equal(one, other) for one, other in zip(after[2::2], fake, strict=True))


@pytest.mark.parametrize(("method", "rank"), [("dmd2", 0), ("dmd2", 2), ("lcm", 0), ("scott", 0), ("progressive", 0)])
def test_training_does_not_notice_the_panel(method: str, rank: int, training: Callable[..., Training]) -> None:
    config = TrainerConfig(iterations=4, warmup=1, precision="no", log_every=1, checkpoint_minutes=0)
    states = []
    for drawn in (True, False):
        here = training(rank)
        stage = next(here.stages(method))

        def show(step: int, here: Training = here, stage: Stage = stage) -> list[Path]:
            return [here.show(stage)]

        folder = here.task.folder / str(drawn)
        student = stage.student.module
        train(stage.phases, here.data.batches, student, config, folder, show if drawn else None, stage.averages)
        states.append(torch.load(folder / "state.pt", weights_only=True))
    for name in ("turns", "ema", "averages"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)
