"""Solvers against exact solutions: each has the order that it declares, and the stochastic ones reach the exact law."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, DenoiserLike, levels
from fewstep.runtime.samplers import SAMPLERS
from fewstep.runtime.samplers.consistency import consistency
from fewstep.runtime.samplers.sde_dpm_solver import sde_dpm_solver
from fewstep.runtime.schedule import Flow, Schedule

START, END = 0.9, 0.1
STEPS = (64, 128, 256)
ODE_SOLVERS = [name for name in sorted(SAMPLERS) if not SAMPLERS[name].stochastic]


def even(steps: int, start: float = START, end: float = END) -> list[float]:
    return [start + (end - start) * step / steps for step in range(steps + 1)]


def noise(k: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def measured_order(errors: list[float]) -> float:
    """Slope of log error against log step."""
    return float(-np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


def noised(schedule: Schedule, x_0: Tensor) -> Tensor:
    alpha, sigma = levels(schedule, scalar(START), x_0)
    return alpha * x_0 + sigma * torch.randn_like(x_0)


def runge_kutta(denoiser: DenoiserLike, x_t: Tensor) -> Tensor:
    """Fourth-order steps of 0.001 on `dx/dt = alpha' x_0 + sigma' eps`, so that VP's knots fall between steps."""
    schedule = denoiser.schedule

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(schedule, t, x_t)
        x_0 = denoiser(x_t, t, {})
        return schedule.d_alpha(t) * x_0 + schedule.d_sigma(t) * (x_t - alpha * x_0) / sigma

    h, inside = -0.001, 1e-12  # a hair inside the step: the slope at a knot must be that of its own side
    for step in range(800):
        t = scalar(START + h * step)
        k_1 = velocity(x_t, t - inside)
        k_2 = velocity(x_t + h / 2 * k_1, t + h / 2)
        k_3 = velocity(x_t + h / 2 * k_2, t + h / 2)
        k_4 = velocity(x_t + h * k_3, t + h + inside)
        x_t = x_t + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x_t


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_order_on_a_gaussian(schedule: Schedule, gaussian: Any, name: str) -> None:
    teacher = gaussian(schedule)
    x_t = noised(schedule, torch.randn(64, 3, dtype=torch.float64))
    exact = teacher.flow(x_t, scalar(START), scalar(END))
    results = [SAMPLERS[name].function(teacher, x_t, even(steps), {}, noise) for steps in STEPS]
    errors = [float((result - exact).norm()) for result in results]
    assert measured_order(errors) == pytest.approx(SAMPLERS[name].order, abs=0.1), errors


@pytest.mark.parametrize("process", ["vp-linear", "flow", "edm", "trig"])
def test_order_on_a_mixture(processes: Mapping[str, Schedule], mixture: Any, process: str) -> None:
    schedule = processes[process]
    teacher = mixture(schedule)
    x_t = noised(schedule, torch.randn(64, 2, dtype=torch.float64))
    exact = runge_kutta(teacher, x_t)
    for name in ODE_SOLVERS:
        results = [SAMPLERS[name].function(teacher, x_t, even(steps), {}, noise) for steps in STEPS]
        errors = [float((result - exact).norm()) for result in results]
        assert measured_order(errors) == pytest.approx(SAMPLERS[name].order, abs=0.1), (name, errors)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_order_of_the_sde_solver_in_distribution(
    schedule: Schedule, gaussian: Any, affine_law: Callable[..., tuple[Tensor, Tensor]], eta: float
) -> None:
    """Its output's exact covariance, without sampling: the Gaussian teacher makes every step affine."""
    teacher = gaussian(schedule)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels(schedule, scalar(time), teacher.mean) for time in (START, END))
    unit = torch.eye(3, dtype=torch.float64)
    start = alpha_t * teacher.mean, alpha_t**2 * teacher.covariance + sigma_t**2 * unit
    exact = alpha_s**2 * teacher.covariance + sigma_s**2 * unit
    errors = []
    for steps in STEPS:
        mean, covariance = affine_law(partial(sde_dpm_solver, eta=eta), teacher, even(steps), *start)
        torch.testing.assert_close(mean, alpha_s * teacher.mean, rtol=1e-9, atol=1e-9)
        errors.append(float((covariance - exact).norm()))
    assert measured_order(errors) == pytest.approx(SAMPLERS["sde-dpm++2m"].order, abs=0.1), errors


def test_sde_solver_samples_the_mixture(mixture: Any) -> None:
    """Forty thousand samples from pure noise have the first three moments of the noised mixture."""
    teacher, count = mixture(Flow()), 40_000
    z = torch.randn(65, count, 2, dtype=torch.float64)
    samples = sde_dpm_solver(teacher, z[0], even(64, 1.0, 0.05), {}, lambda k: z[k])
    component = torch.multinomial(teacher.weights, count, replacement=True)
    x_0 = teacher.means[component] + teacher.variances[component, None].sqrt() * torch.randn(count, 2).double()
    exact = 0.95 * x_0 + 0.05 * torch.randn(count, 2).double()
    for power in (1, 2, 3):
        difference = (samples**power).mean(0) - (exact**power).mean(0)
        error = ((samples**power).var(0) / count + (exact**power).var(0) / count).sqrt()
        bias = 2e-3  # what 64 second-order steps leave
        assert (difference.abs() < 4 * error + bias).all(), (power, difference, error)


def test_consistency_sampler_keeps_the_data_law_of_a_consistency_function(
    schedule: Schedule, gaussian: Any, affine_law: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """With the exact end of the trajectory in place of `x_0`, every number of steps gives the data distribution."""
    teacher = gaussian(schedule)

    class ConsistencyFunction:
        schedule = teacher.schedule

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            end: Tensor = teacher.flow(x_t, t, scalar(0.0))
            return end

    alpha, sigma = levels(schedule, scalar(1.0), teacher.mean)
    start = alpha * teacher.mean, alpha**2 * teacher.covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
    for times in ([1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.75, 0.5, 0.25, 0.0]):
        mean, covariance = affine_law(consistency, ConsistencyFunction(), times, *start)
        torch.testing.assert_close(mean, teacher.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(covariance, teacher.covariance, rtol=1e-9, atol=1e-9)


def test_consistency_step_noises_the_prediction_to_the_next_level(
    schedule: Schedule, gaussian: Any, affine_law: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """An ordinary denoiser's predictions vary less than the data, by the posterior variance: the law of one step."""
    teacher, unit = gaussian(schedule), torch.eye(3, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels(schedule, scalar(time), teacher.mean) for time in (0.8, 0.4))
    total = alpha_t**2 * teacher.covariance + sigma_t**2 * unit
    mean, covariance = affine_law(consistency, teacher, [0.8, 0.4], alpha_t * teacher.mean, total)
    explained = alpha_t**2 * teacher.covariance @ torch.linalg.solve(total, teacher.covariance)
    torch.testing.assert_close(mean, alpha_s * teacher.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, alpha_s**2 * explained + sigma_s**2 * unit, rtol=1e-9, atol=1e-9)
