"""The processes, an analytic teacher of each kind under any of them, and the exact law of a sampler's output."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fewstep.runtime.denoiser import DenoiserLike
from fewstep.runtime.samplers import SamplerFunction
from fewstep.runtime.schedule import EDM, VP, Flow, Schedule, Trig

from ..analytic import Gaussian, Mixture

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
def gaussian() -> Callable[..., Gaussian]:
    """In three dimensions, correlated, under the process given."""
    teacher = Gaussian(f64([0.7, -0.4, 0.2]), f64([[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.05]]))
    return lambda schedule, **changes: replace(teacher, schedule=schedule, **changes)


@pytest.fixture
def mixture() -> Callable[..., Mixture]:
    """Three components in the plane, under the process given."""
    teacher = Mixture(f64([[1.0, 0.5], [-0.8, 0.3], [0.1, -1.0]]), f64([0.5, 0.3, 0.2]), f64([0.1, 0.2, 0.05]))
    return lambda schedule, **changes: replace(teacher, schedule=schedule, **changes)


@pytest.fixture
def affine_law() -> Callable[..., tuple[Tensor, Tensor]]:
    return _affine_law
