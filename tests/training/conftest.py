"""Analytic teachers and tiny networks on points (B, 2), small enough to train within a test."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.denoiser import Condition, Denoiser, DenoiserLike, levels
from fewstep.runtime.prediction import FROM_SAMPLE
from fewstep.runtime.schedule import Flow, Schedule
from fewstep.training.batches import ConditionedBatch
from fewstep.training.methods.dmd2 import DMD2Networks


@dataclass(frozen=True)
class Gaussian:
    """`x_0 ~ N(mean, variance I)`."""

    mean: Tensor
    variance: float = 0.5
    schedule: Schedule = field(default_factory=Flow)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = levels(self.schedule, t, x_t)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log density of `x_t ~ N(alpha mean, alpha^2 variance + sigma^2)`."""
        alpha, sigma = levels(self.schedule, t, x_t)
        return -(x_t - alpha * self.mean) / (alpha**2 * self.variance + sigma**2)

    def flow(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The probability flow from t to 0: an exact one-step student."""
        alpha, sigma = levels(self.schedule, t, x_t)
        growth = (self.variance / (alpha**2 * self.variance + sigma**2)) ** 0.5
        return self.mean + growth * (x_t - alpha * self.mean)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.mean + self.variance**0.5 * torch.randn(count, len(self.mean), generator=generator)


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians of one variance at `means` (K, 2)."""

    means: Tensor = field(default_factory=lambda: torch.tensor([[1.0, 0.6], [-1.0, 0.6], [0.0, -1.1]]))
    weights: Tensor = field(default_factory=lambda: torch.tensor([0.5, 0.3, 0.2]))
    variance: float = 0.06
    schedule: Schedule = field(default_factory=Flow)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (value.unsqueeze(-1) for value in levels(self.schedule, t, x_t))  # against (B, K, 2)
        spread = alpha**2 * self.variance + sigma**2
        offset = x_t[:, None] - alpha * self.means
        logits = self.weights.log() - (offset**2 / spread).sum(-1) / 2
        means = self.means + alpha * self.variance / spread * offset
        return (logits.softmax(-1).unsqueeze(-1) * means).sum(1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.means[component] + self.variance**0.5 * torch.randn(count, 2, generator=generator)


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


def _point_networks(teacher: DenoiserLike | None, width: int = 64) -> DMD2Networks:
    student, fake = PointNetwork(width), PointNetwork(width)
    head = nn.Linear(width, 1)
    fake_denoiser = Denoiser(fake, Flow(), "flow_prediction")
    student_denoiser = Denoiser(student, Flow(), "flow_prediction")
    return DMD2Networks(student, student_denoiser, teacher or fake_denoiser, fake_denoiser, fake, fake.trunk, head, {})


@pytest.fixture
def gaussian() -> type[Gaussian]:
    return Gaussian


@pytest.fixture
def mixture() -> type[Mixture]:
    return Mixture


@pytest.fixture
def point_network() -> type[PointNetwork]:
    return PointNetwork


@pytest.fixture
def analytic_denoiser() -> Callable[[DenoiserLike, str], Denoiser]:
    """Wrap an analytic teacher as a network of a prediction type, on the straight-line process."""
    return _analytic_denoiser


@pytest.fixture
def point_networks() -> Callable[..., DMD2Networks]:
    """DMD2's networks on points; without a teacher, the fake-score network is the teacher too."""
    return _point_networks


@pytest.fixture
def point_batch() -> ConditionedBatch:
    return ConditionedBatch(torch.randn(32, 2), {})
