"""The analytic teachers themselves: what every other test of this folder leans on."""

from typing import Any

import pytest
import torch

from fewstep.runtime.denoiser import levels
from fewstep.runtime.schedule import Schedule

f64 = torch.float64


def test_gaussian_teacher_is_the_posterior_mean(schedule: Schedule, gaussian: Any) -> None:
    """Linear regression of `x_0` on `x_t`: `E[x_0 | x_t] = m + Cov(x_0, x_t) Var(x_t)^-1 (x_t - alpha m)`."""
    teacher = gaussian(schedule)
    x_t = torch.randn(6, 3, dtype=f64)
    for time in (0.1, 0.5, 1.0):
        alpha, sigma = levels(schedule, torch.tensor(time, dtype=f64), x_t)
        total = alpha**2 * teacher.covariance + sigma**2 * torch.eye(3, dtype=f64)
        gain = torch.linalg.solve(total, alpha * teacher.covariance).T
        expected = teacher.mean + (x_t - alpha * teacher.mean) @ gain.T
        torch.testing.assert_close(teacher(x_t, torch.tensor(time, dtype=f64), {}), expected)


def test_mixture_teacher_is_the_posterior_mean(schedule: Schedule, mixture: Any) -> None:
    """`E[x_0 | x_t]` in one dimension by integration over `x_0` with the trapezium rule, exact for such tails."""
    teacher = mixture(
        schedule,
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=f64),
        means=torch.tensor([[1.0], [-0.8], [0.1]], dtype=f64),
        variances=torch.tensor([0.1, 0.2, 0.05], dtype=f64),
    )
    x_0 = torch.linspace(-6, 6, 20_001, dtype=f64)
    prior = (
        (teacher.weights * (-0.5 * (x_0[:, None] - teacher.means[:, 0]) ** 2 / teacher.variances).exp())
        / teacher.variances.sqrt()
    ).sum(1)
    for time in (0.3, 0.6, 1.0):
        t = torch.tensor(time, dtype=f64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = torch.linspace(-1.5, 1.5, 7, dtype=f64).reshape(-1, 1) * (alpha + sigma)
        posterior = prior * (-0.5 * ((x_t - alpha * x_0) / sigma) ** 2).exp()
        expected = (posterior * x_0).sum(1, keepdim=True) / posterior.sum(1, keepdim=True)
        torch.testing.assert_close(teacher(x_t, t, {}), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_teachers_take_one_time_or_one_for_each_sample(schedule: Schedule, kind: str, request: Any) -> None:
    teacher = request.getfixturevalue(kind)(schedule)
    x_t = torch.randn(5, 3 if kind == "gaussian" else 2, dtype=f64)
    t = torch.tensor(0.6, dtype=f64)
    torch.testing.assert_close(teacher(x_t, t, {}), teacher(x_t, t.expand(5), {}))


def test_gaussian_flow_satisfies_the_equation(schedule: Schedule, gaussian: Any) -> None:
    """`dx/dt = alpha' x_0 + sigma' eps` along the closed-form trajectory, by automatic differentiation."""
    teacher = gaussian(schedule)
    start, now = torch.tensor(0.9, dtype=f64), torch.tensor(0.43217, dtype=f64)
    x_start = torch.randn(4, 3, dtype=f64)
    x_t = teacher.flow(x_start, start, now)
    velocity = torch.autograd.functional.jacobian(lambda s: teacher.flow(x_start, start, s), now)
    alpha, sigma = levels(schedule, now, x_t)
    x_0 = teacher(x_t, now, {})
    expected = schedule.d_alpha(now) * x_0 + schedule.d_sigma(now) * (x_t - alpha * x_0) / sigma
    torch.testing.assert_close(velocity, expected, rtol=1e-9, atol=1e-9)
