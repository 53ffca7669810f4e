"""Analytic teachers: data distributions whose `x_0`-prediction and probability flow are known under every process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fewstep.runtime.denoiser import Condition, DenoiserLike, levels
from fewstep.runtime.samplers import SamplerFunction
from fewstep.runtime.schedule import EDM, VP, Flow, Schedule, Trig

PROCESSES: Mapping[str, Schedule] = {
    "vp-linear": VP(DDIMScheduler(beta_schedule="linear").alphas_cumprod),
    "vp-scaled-linear": VP(
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    ),
    "vp-squaredcos": VP(DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod),
    "flow": Flow(),
    "flow-shift-3": Flow(shift=3.0),
    "edm": EDM(),
    "trig": Trig(),
}


def f64(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """`x_0 ~ N(mean, covariance)`; works on x (B, D)."""

    schedule: Schedule
    mean: Tensor = field(default_factory=lambda: f64([0.7, -0.4, 0.2]))
    covariance: Tensor = field(default_factory=lambda: f64([[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.05]]))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """`mean + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean)`, in the eigenbasis of C."""
        alpha, sigma = levels(self.schedule, t, x_t)
        variances, basis = torch.linalg.eigh(self.covariance)
        gain = alpha * variances / (alpha**2 * variances + sigma**2)
        return self.mean + ((x_t - alpha * self.mean) @ basis * gain) @ basis.T

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact probability flow from t to s: every principal component keeps its number of standard deviations."""
        variances, basis = torch.linalg.eigh(self.covariance)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels(self.schedule, time, x_t) for time in (t, s))
        growth = ((alpha_s**2 * variances + sigma_s**2) / (alpha_t**2 * variances + sigma_t**2)).sqrt()
        return alpha_s * self.mean + ((x_t - alpha_t * self.mean) @ basis * growth) @ basis.T


@dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians; works on x (B, D)."""

    schedule: Schedule
    weights: Tensor = field(default_factory=lambda: f64([0.5, 0.3, 0.2]))
    means: Tensor = field(default_factory=lambda: f64([[1.0, 0.5], [-0.8, 0.3], [0.1, -1.0]]))
    variances: Tensor = field(default_factory=lambda: f64([0.1, 0.2, 0.05]))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The components' posterior means, weighted by their responsibilities."""
        alpha, sigma = (value.unsqueeze(-1) for value in levels(self.schedule, t, x_t))  # against (B, components, D)
        spread = alpha**2 * self.variances[:, None] + sigma**2
        offset = x_t[:, None] - alpha * self.means
        log_likelihood = (-0.5 * (offset**2 / spread + spread.log())).sum(-1)
        responsibility = (self.weights.log() + log_likelihood).softmax(-1).unsqueeze(-1)
        return (responsibility * (self.means + alpha * self.variances[:, None] / spread * offset)).sum(1)


def _affine_law(
    sampler: SamplerFunction, denoiser: DenoiserLike, times: list[float], mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact mean (D,) and covariance (D, D) of a sampler's output for an affine denoiser and Gaussian `x_T`.

    The output is then affine in `x_T` and in every noise draw, so unit vectors in their places give its coefficients.
    """
    size, draws = len(mean), len(times)
    rows = torch.eye(size * draws, dtype=mean.dtype).reshape(-1, draws, size)
    inputs = torch.cat([torch.zeros_like(rows[:1]), rows])
    outputs = sampler(denoiser, inputs[:, 0], times, {}, lambda k: inputs[:, k])
    coefficients = (outputs[1:] - outputs[0]).reshape(draws, size, size)  # (draw, input, output)
    out_mean = outputs[0] + mean @ coefficients[0]
    out_covariance = coefficients[0].T @ covariance @ coefficients[0]
    return out_mean, out_covariance + sum(part.T @ part for part in coefficients[1:])


@pytest.fixture(params=PROCESSES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return PROCESSES[request.param]


@pytest.fixture
def processes() -> Mapping[str, Schedule]:
    return PROCESSES


@pytest.fixture
def gaussian() -> type[Gaussian]:
    return Gaussian


@pytest.fixture
def mixture() -> type[Mixture]:
    return Mixture


@pytest.fixture
def affine_law() -> Callable[..., tuple[Tensor, Tensor]]:
    return _affine_law
