"""Straight paths: every process is a flow once its times are matched, and stays itself under the sampler."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, DenoiserLike, add_noise, broadcast, initial_scale
from fewstep.runtime.samplers.ddim import ddim, ddim_step
from fewstep.runtime.samplers.euler import euler
from fewstep.runtime.samplers.grid import level
from fewstep.runtime.schedule import Flow, Schedule, Trig, uniform_times
from fewstep.training.straight_path import (
    flow_times,
    from_flow_time,
    landing_sample,
    straight_point,
    to_flow_time,
    velocity_difference,
)

from .points import Free

f64 = torch.float64


class AsFlow:
    """A denoiser of any process as one of the straight-line process: shown `(a + b) y_s` at the matched time."""

    schedule = Flow()

    def __init__(self, denoiser: DenoiserLike) -> None:
        self.denoiser = denoiser

    def __call__(self, y: Tensor, s: Tensor, condition: Condition) -> Tensor:
        t = from_flow_time(self.denoiser.schedule, s)
        ends = torch.zeros(2, 1, dtype=f64), torch.ones(2, 1, dtype=f64)
        scale = initial_scale(self.denoiser.schedule, 1.0)
        total = sum(straight_point(self.denoiser.schedule, x_0, scale * z, t)[0] for x_0, z in (ends, ends[::-1]))
        return self.denoiser(broadcast(torch.as_tensor(total), y) * y, t, condition)


def no_noise(_: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def test_flow_time_runs_from_0_to_1_and_back(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 101, dtype=f64)
    s = to_flow_time(schedule, t)
    assert s[0] == 0
    assert s[-1] == pytest.approx(1, abs=1e-12)
    assert (s.diff() > 0).all()
    torch.testing.assert_close(from_flow_time(schedule, s), t, rtol=0, atol=1e-6)
    torch.testing.assert_close(to_flow_time(schedule, from_flow_time(schedule, s[1:])), s[1:], rtol=0, atol=1e-6)


def test_times_of_a_flow_are_its_own() -> None:
    for steps in (1, 2, 3, 4):
        times = flow_times(Flow(), steps)
        assert times == pytest.approx(uniform_times(steps), abs=1e-8)
        assert (times[0], times[-1]) == (1, 0)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_euler_on_the_flow_is_ddim_on_the_process(schedule: Schedule, mixture: Any, steps: int) -> None:
    """The student's network, times and sampler are a flow's without any change to what is saved."""
    teacher = mixture(*(value.double() for value in (mixture().means, mixture().weights)), schedule=schedule)
    z = torch.randn(16, 2, dtype=f64)
    by_flow = euler(AsFlow(teacher), z, uniform_times(steps), {}, no_noise)
    start = initial_scale(schedule, 1.0) * z
    for sampler in (ddim, euler):
        own = sampler(teacher, start, flow_times(schedule, steps), {}, no_noise)
        torch.testing.assert_close(own, by_flow, rtol=1e-6, atol=1e-7)


def test_ddim_with_the_right_sample_stays_on_the_straight_path(schedule: Schedule) -> None:
    x_0, z = torch.randn(2, 8, 3, dtype=f64)
    x_T = initial_scale(schedule, 1.0) * z
    torch.testing.assert_close(straight_point(schedule, x_0, x_T, torch.tensor(1.0, dtype=f64)), x_T)
    torch.testing.assert_close(straight_point(schedule, x_0, x_T, torch.tensor(0.0, dtype=f64)), x_0)

    times = flow_times(schedule, 4)
    for end in range(1, 4):
        x_t = ddim(Free(x_0, schedule), x_T, times[: end + 1], {}, no_noise)
        torch.testing.assert_close(x_t, straight_point(schedule, x_0, x_T, torch.tensor(times[end], dtype=f64)))


def test_processes_that_end_in_pure_noise_keep_their_own_levels() -> None:
    x_0, z = torch.randn(2, 8, 3, dtype=f64)
    t = torch.rand(8, dtype=f64)
    for schedule in (Flow(), Flow(shift=3.0), Trig()):
        torch.testing.assert_close(straight_point(schedule, x_0, z, t), add_noise(schedule, x_0, z, t))


def test_velocity_difference_is_that_of_the_flow(schedule: Schedule) -> None:
    """`v = (y_s - x_0) / s`, so at one `y_s` velocities differ by the samples' difference over s."""
    x_0, other, z = torch.randn(3, 6, 4, dtype=f64)
    s = torch.rand(6, dtype=f64) * 0.98 + 0.01
    y = (1 - s[:, None]) * x_0 + s[:, None] * z
    expected = (y - other) / s[:, None] - (z - x_0)
    t = from_flow_time(schedule, s)
    torch.testing.assert_close(velocity_difference(schedule, other, x_0, t), expected, rtol=1e-6, atol=1e-7)


def test_landing_sample_inverts_ddim(schedule: Schedule) -> None:
    x_t, x_0 = torch.randn(2, 5, 3, dtype=f64)
    here = level(schedule, torch.tensor([1.0, 0.9, 0.5, 0.3, 0.2], dtype=f64), x_t)
    there = level(schedule, torch.tensor([0.5, 0.0, 0.4, 0.1, 0.0], dtype=f64), x_t)
    torch.testing.assert_close(landing_sample(x_t, ddim_step(x_t, x_0, here, there), here, there), x_0)
