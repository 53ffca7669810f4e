"""Tiny networks on points (B, 2), small enough to train within a test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.denoiser import Condition, Denoiser, DenoiserLike, levels
from fewstep.runtime.prediction import FROM_SAMPLE
from fewstep.runtime.schedule import Flow, Schedule, uniform_times
from fewstep.training.batches import ConditionedBatch
from fewstep.training.method import Copy, Task
from fewstep.training.methods.dmd2 import Networks
from fewstep.training.phase import Draws

from .points import PROCESSES


class PointNetwork(nn.Module):
    """A network on points: `trunk` gives features for a discriminator, `last` the output."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        angle = network_time[:, None] / 1000 * torch.tensor([1.0, 4.0, 16.0])
        output: Tensor = self.last(self.trunk(torch.cat([x, angle.sin()], dim=1)))
        return output


def _analytic_denoiser(teacher: DenoiserLike, prediction: str) -> Denoiser:
    def network(x_t: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        t = network_time / 1000
        x_0 = teacher(x_t, t, condition)
        return FROM_SAMPLE[prediction](x_0, x_t, *levels(teacher.schedule, t, x_t))

    return Denoiser(network, Flow(), prediction)


class PointCopies:
    """Fresh point networks in the place of copies of the teacher; `made` keeps them by name."""

    def __init__(self, prediction: str, width: int) -> None:
        self.prediction, self.width = prediction, width
        self.made: dict[str, Copy] = {}

    def __call__(self, name: str, embed_guidance: bool = False) -> Copy:
        network = PointNetwork(self.width)
        self.made[name] = Copy(network, Denoiser(network, Flow(), self.prediction), network)
        return self.made[name]


def _point_task(
    teacher: DenoiserLike,
    folder: Path,
    steps: int = 1,
    prediction: str = "flow_prediction",
    width: int = 64,
) -> Task:
    def batches(step: int, phase: int) -> ConditionedBatch:
        generator = torch.Generator().manual_seed(1000 * step + phase)
        return ConditionedBatch(torch.randn(32, 2, generator=generator), {})

    def feature_block(network: nn.Module) -> tuple[nn.Module, int]:
        assert isinstance(network, PointNetwork)
        return network.trunk, width

    denoiser = teacher if isinstance(teacher, Denoiser) else _analytic_denoiser(teacher, prediction)
    copies = PointCopies(prediction, width)
    return Task(
        denoiser, {}, 1.0, steps, (2,), batches, copies, feature_block, nn.Identity(), folder, torch.device("cpu")
    )


def _point_networks(teacher: DenoiserLike | None, steps: int = 1, width: int = 64) -> Networks:
    copies = PointCopies("flow_prediction", width)
    student, fake, head = copies("student"), copies("fake"), nn.Linear(width, 1)
    assert isinstance(fake.network, PointNetwork)
    times = tuple(uniform_times(steps))
    return Networks(student, teacher or fake.denoiser, fake, fake.network.trunk, head, times)


@pytest.fixture(params=PROCESSES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Each process in turn."""
    return PROCESSES[request.param]


@pytest.fixture
def point_network() -> type[PointNetwork]:
    return PointNetwork


@pytest.fixture
def analytic_denoiser() -> Callable[[DenoiserLike, str], Denoiser]:
    """Wrap an analytic teacher as a network of a prediction type, on the straight-line process."""
    return _analytic_denoiser


@pytest.fixture
def point_task(tmp_path: Path) -> Callable[..., Task]:
    """What a method is given, on points: `point_task(teacher, steps=1, prediction="flow_prediction", width=64)`.

    Copies begin at random, not as the teacher.
    """

    def make(teacher: DenoiserLike, steps: int = 1, prediction: str = "flow_prediction", width: int = 64) -> Task:
        return _point_task(teacher, tmp_path, steps, prediction, width)

    return make


@pytest.fixture
def point_networks() -> Callable[..., Networks]:
    """DMD2's networks on points; without a teacher, the fake-score network is the teacher too."""
    return _point_networks


@pytest.fixture
def point_batch() -> ConditionedBatch:
    return ConditionedBatch(torch.randn(32, 2), {})


@pytest.fixture
def draws() -> Callable[..., Draws]:
    """Sources of randomness by seed: `draws(seed=0)`."""

    def make(seed: int = 0) -> Draws:
        return Draws(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1))

    return make
