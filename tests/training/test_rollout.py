"""Backward simulation: the index, the gradient, and the inputs that training then sees."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, levels
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import Flow, Schedule
from fewstep.training.numerics import step_draws
from fewstep.training.phase import Draws
from fewstep.training.rollout import backward_simulation

FOUR = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass
class Recorder:
    """A student that notes the inputs of its calls."""

    inner: Callable[[Tensor, Tensor], Tensor]
    schedule: Schedule = field(default_factory=Flow)
    calls: list[tuple[Tensor, float]] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((x_t.detach().clone(), float(t)))
        return self.inner(x_t, t)


def draws_of(seed: int) -> Draws:
    return Draws(torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(seed))


def simulate(seed: int, times: tuple[float, ...] = FOUR, shape: tuple[int, ...] = (2, 3)) -> Recorder:
    student = Recorder(lambda x_t, t: x_t * t)
    backward_simulation(student, shape, times, {}, draws_of(seed))
    return student


def test_processes_share_the_step_and_not_the_noise() -> None:
    counts = []
    for step in range(40):
        students = []
        for shard in range(2):
            student = Recorder(lambda x_t, t: x_t * t)
            draws = step_draws(5, step, 1, torch.device("cpu"), shard, shards=2)
            backward_simulation(student, (2, 3), FOUR, {}, draws)
            students.append(student)
        first, second = (student.calls for student in students)
        assert [t for _, t in first] == [t for _, t in second]
        assert not torch.equal(first[0][0], second[0][0])
        counts.append(len(first))
    assert set(counts) == {1, 2, 3, 4}


def test_every_step_is_visited_at_its_time() -> None:
    for seed in range(10):
        times = [t for _, t in simulate(seed).calls]
        assert times == list(FOUR[: len(times)])


def test_one_step_student_is_called_once_on_pure_noise() -> None:
    draws = draws_of(3)
    student = Recorder(lambda x_t, t: 2 * x_t)
    x_0 = backward_simulation(student, (5, 2), (1.0, 0.0), {}, draws)
    (x_t, t), *others = student.calls
    assert t == 1
    assert not others
    torch.testing.assert_close(x_0, 2 * x_t)
    after = draws_of(3).own
    torch.randn(5, 2, generator=after)
    assert torch.equal(after.get_state(), draws.own.get_state())  # no noise was drawn for a step that is not there


def test_gradient_flows_through_the_last_call_only() -> None:
    """With weights of their own for each call, only the last one's receive a gradient."""
    for seed in range(8):
        weights = torch.ones(4, requires_grad=True)
        call = iter(range(4))
        student = Recorder(lambda x_t, t, weights=weights, call=call: weights[next(call)] * x_t)
        backward_simulation(student, (2, 3), FOUR, {}, draws_of(seed)).sum().backward()
        assert weights.grad is not None
        assert weights.grad.nonzero().flatten().tolist() == [len(student.calls) - 1]


@pytest.mark.parametrize("schedule", [Flow(), Flow(shift=3.0)], ids=["flow", "shifted"])
def test_inputs_of_an_exact_student_have_the_marginals_of_the_process(gaussian: Any, schedule: Schedule) -> None:
    """A student that draws from the data itself sees `x_t ~ N(alpha m, alpha^2 v + sigma^2)` at each of its steps."""
    data = gaussian(torch.tensor([0.8, -0.5]), 0.3, schedule)
    seed = next(seed for seed in range(100) if len(simulate(seed).calls) == 4)
    student = Recorder(data.flow, schedule)
    x_0 = backward_simulation(student, (20_000, 2), FOUR, {}, draws_of(seed))
    for x_t, time in student.calls:
        alpha, sigma = levels(schedule, torch.tensor(time), x_t)
        torch.testing.assert_close(x_t.mean(0), alpha * data.mean, rtol=0, atol=0.03)
        expected = ((alpha**2 * data.variance + sigma**2) * torch.eye(2)).to(x_t)
        torch.testing.assert_close(x_t.T.cov(), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(x_0.mean(0), data.mean, rtol=0, atol=0.03)


def test_full_rollout_is_consistency_sampling() -> None:
    """Given the same noise, training walks the path that generation walks."""
    seed = next(seed for seed in range(100) if len(simulate(seed).calls) == 4)
    expected = backward_simulation(Recorder(lambda x_t, t: x_t.tanh() * t), (3, 2), FOUR, {}, draws_of(seed))
    generator = draws_of(seed).own
    noise = [torch.randn(3, 2, generator=generator) for _ in range(4)]
    student = Recorder(lambda x_t, t: x_t.tanh() * t)
    result = get_sampler("consistency").function(student, noise[0], FOUR, {}, lambda step: noise[step])
    torch.testing.assert_close(result, expected)
