"""Rectified flow: exact gradients, what is straight on a Gaussian, and that points reach the teacher's distribution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.runtime.denoiser import Condition, Denoiser, initial_scale, levels
from fewstep.runtime.prediction import FROM_SAMPLE
from fewstep.runtime.samplers.euler import euler
from fewstep.runtime.samplers.grid import level
from fewstep.runtime.schedule import EDM, Flow, Schedule
from fewstep.training.method import Task
from fewstep.training.methods.rectified_flow import Config, stages
from fewstep.training.pair_regression import EARLIEST, predict_on_path, reflow_loss, segment_loss, uniform_flow_times
from fewstep.training.pairs import PairBatch, PairsConfig
from fewstep.training.phase import Draws
from fewstep.training.straight_path import flow_times, from_flow_time, landing_sample, straight_point, to_flow_time

from .points import PROCESSES, Free, on_process, sample, samples, seeded, sliced_distance, train_stages, with_data

f64 = torch.float64
START = torch.tensor(1.0, dtype=f64)


@pytest.fixture
def teacher(schedule: Schedule, gaussian: Any) -> Any:
    return gaussian(torch.tensor([0.5, -0.3], dtype=f64), schedule=schedule)


@dataclass(frozen=True)
class Straight:
    """What reflow makes of a Gaussian teacher, whose probability flow is `x_0 = flow(0) + gain x_T`."""

    teacher: Any

    @property
    def schedule(self) -> Schedule:
        return self.teacher.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        zero, one = torch.zeros(1, 2, dtype=f64), torch.ones(1, 2, dtype=f64)
        offset = self.teacher.flow(zero, START)
        gain = self.teacher.flow(one, START) - offset
        kept, signal = straight_point(self.schedule, zero, one, t), straight_point(self.schedule, one, zero, t)
        return offset + gain * (x_t - signal * offset) / (kept + signal * gain)


@dataclass(frozen=True)
class OnTrajectory:
    """The student whose step from each of `times` lands exactly where the teacher's flow is at the next."""

    teacher: Any
    times: tuple[float, ...]

    @property
    def schedule(self) -> Schedule:
        return self.teacher.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times = torch.tensor(self.times, dtype=f64)
        s = times[(times - t[:, None]).abs().argmin(1) + 1]
        here, there = (level(self.schedule, time, x_t) for time in (t.double(), s))
        return landing_sample(x_t, self.teacher.flow(x_t, t.double(), s), here, there)


def gaussian_pairs(teacher: Any, times: tuple[float, ...] = (1.0, 0.0), count: int = 64) -> PairBatch:
    x_T = initial_scale(teacher.schedule, 1.0) * torch.randn(count, 2, dtype=f64)
    return PairBatch(torch.stack([teacher.flow(x_T, START, torch.tensor(t, dtype=f64)) for t in times]), {})


def test_reflowed_gaussian_is_straight(teacher: Any) -> None:
    """Its loss is 0, and one step of Euler's rule from noise is the solution of the teacher's equation."""
    straight, batch = Straight(teacher), gaussian_pairs(teacher)
    s = EARLIEST + (1 - EARLIEST) * torch.rand(64, dtype=f64)
    assert_none(reflow_loss(straight, batch, s))
    solution = batch.path[-1]
    for steps in (1, 3):
        reached = euler(straight, batch.path[0], flow_times(teacher.schedule, steps), {}, no_noise)
        torch.testing.assert_close(reached.float(), solution.float())
    curved = euler(teacher, batch.path[0], (1.0, 0.0), {}, no_noise)
    assert (curved - solution).abs().mean() > 0.1  # which takes the teacher itself many steps


def assert_none(loss: Tensor) -> None:
    # The student's float32 inputs leave rounding errors; squared, they are far below this.
    assert float(loss) < 1e-9


def test_gradient_of_reflow(teacher: Any) -> None:
    """`2 (x_hat - x_0) / s^2`, per element."""
    batch, s = gaussian_pairs(teacher), torch.rand(64, dtype=f64).clamp_min(EARLIEST)
    output = torch.randn(64, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(reflow_loss(Free(output, teacher.schedule), batch, s), output)
    expected = 2 * (output.detach() - batch.path[-1]) / s[:, None] ** 2 / output.numel()
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_reflow_is_the_same_for_every_prediction_type(prediction: str, teacher: Any) -> None:
    def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        t = from_flow_time(teacher.schedule, s)
        x_t = x / teacher.schedule.input_scale(t)[:, None]
        return FROM_SAMPLE[prediction](teacher(x_t, t, condition), x_t, *levels(teacher.schedule, t, x_t))

    batch, s = gaussian_pairs(teacher), 0.05 + 0.9 * torch.rand(64, dtype=f64)
    student = Denoiser(network, teacher.schedule, prediction)
    torch.testing.assert_close(reflow_loss(student, batch, s), reflow_loss(teacher, batch, s), rtol=1e-3, atol=0)


def test_velocity_of_a_pair(schedule: Schedule) -> None:
    """A student's velocity `(y_s - x_hat) / s` differs from `z - x_0` by what is returned."""
    x_0, z = torch.randn(2, 16, 2, dtype=f64)
    s = 0.1 + 0.9 * torch.rand(16, dtype=f64)
    guess = torch.randn(16, 2, dtype=f64)
    batch = PairBatch(torch.stack([initial_scale(schedule, 1.0) * z, x_0]), {})
    predicted, difference = predict_on_path(Free(guess, schedule), batch, s)
    y = (1 - s[:, None]) * x_0 + s[:, None] * z
    expected = (y - guess) / s[:, None] - (z - x_0)
    torch.testing.assert_close(predicted, guess.float())
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-5)


def test_distillation_is_done_when_every_step_lands_on_the_trajectory(teacher: Any, draws: Callable[[], Draws]) -> None:
    times = flow_times(teacher.schedule, 3)
    student, batch = OnTrajectory(teacher, times), gaussian_pairs(teacher, times)
    assert_none(segment_loss(student, batch, times, draws()))
    assert segment_loss(teacher, batch, times, draws()) > 1e-4


def test_distillation_to_one_step_is_reflow_at_the_start(teacher: Any, draws: Callable[[], Draws]) -> None:
    batch = gaussian_pairs(teacher)
    at_start = reflow_loss(teacher, batch, torch.ones(64, dtype=f64))
    torch.testing.assert_close(segment_loss(teacher, batch, (1.0, 0.0), draws()), at_start, rtol=1e-4, atol=1e-7)


def test_gradient_of_distillation(teacher: Any, draws: Callable[[], Draws]) -> None:
    """To one step it is `2 (x_hat - x_0)` per element."""
    batch, output = gaussian_pairs(teacher), torch.randn(64, 2, requires_grad=True)
    loss = segment_loss(Free(output, teacher.schedule), batch, (1.0, 0.0), draws())
    (gradient,) = torch.autograd.grad(loss, output)
    expected = 2 * (output.detach() - batch.path[-1]) / output.numel()
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-6)


def test_times_of_training_are_even(draws: Callable[[], Draws]) -> None:
    s = uniform_flow_times(20_000, draws())
    assert s.min() >= EARLIEST
    assert s.max() <= 1
    assert float(s.mean()) == pytest.approx((1 + EARLIEST) / 2, abs=0.01)
    assert float(to_flow_time(Flow(), s).std()) == pytest.approx(0.99 / 12**0.5, abs=0.005)


def test_each_round_learns_from_the_flow_before_it(point_task: Callable[..., Task], mixture: Any) -> None:
    task = point_task(mixture(), steps=2)
    config = Config(rounds=2, guidance=1.0, pairs=PairsConfig(count=32, sampler="ddim", solver_steps=4))
    found = list(stages(task, config))
    assert [stage.name for stage in found] == ["reflow-1", "reflow-2", "distillation"]
    assert sum(stage.share for stage in found) == pytest.approx(1)
    assert {stage.times for stage in found} == {(1.0, 0.5, 0.0)}
    assert {stage.sampler for stage in found} == {"euler"}
    assert len({id(stage.student) for stage in found}) == 1
    origins = [next((task.folder / "pairs").glob(f"{stage.name}-*")) / "origin.safetensors" for stage in found]
    by_teacher, by_student, _ = (load_file(origin)["answer"] for origin in origins)
    assert not torch.allclose(by_teacher, by_student, atol=0.05)


@pytest.mark.parametrize(
    ("schedule", "prediction", "steps", "distance"),
    [(Flow(), "flow_prediction", 1, 0.1), (PROCESSES["vp"], "v_prediction", 2, 0.13), (EDM(), "edm", 1, 0.18)],
    ids=["flow", "vp", "edm"],
)
def test_student_learns_the_distribution_of_an_analytic_teacher(
    schedule: Schedule,
    prediction: str,
    steps: int,
    distance: float,
    mixture: Any,
    point_task: Callable[..., Task],
) -> None:
    """For scale: two draws of 4,000 samples of the data lie 0.016 apart, data and the pairs' solver 0.02 to 0.09."""
    teacher = mixture(schedule=schedule)
    data = teacher.sample(4000, seeded(1))
    task = on_process(with_data(point_task(teacher, steps), teacher.sample), teacher, prediction)
    config = Config(learning_rate=5e-3, pairs=PairsConfig(count=128 * 32, sampler="heun", solver_steps=12))
    after = [sliced_distance(samples(stage), data) for stage in train_stages(task, stages(task, config), 250)]
    coarse = sliced_distance(sample(task.teacher, "euler", flow_times(schedule, steps)), data)
    assert after[-1] < distance
    assert after[-1] < coarse / 2


def no_noise(_: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")
