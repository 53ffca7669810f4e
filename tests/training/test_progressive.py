"""Progressive distillation: its target, exact gradients, halving, and that one step comes to do what eight did."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.samplers.ddim import ddim, ddim_step
from fewstep.runtime.samplers.grid import level
from fewstep.runtime.schedule import Flow, Schedule, uniform_times
from fewstep.training.batches import ConditionedBatch
from fewstep.training.method import Task
from fewstep.training.methods.progressive import Config, halving_loss, halvings, stages, two_step_target
from fewstep.training.phase import Draws

from .points import Free, sample, samples, train_stages, with_data

f64 = torch.float64


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_one_step_to_the_target_is_two_of_the_teacher(schedule: Schedule, steps: int, gaussian: Any) -> None:
    """Against the sampler, which works on numbers instead of on a batch of times."""
    teacher = gaussian(torch.tensor([0.5, -0.3], dtype=f64), schedule=schedule)
    x_t = torch.randn(steps, 2, dtype=f64)
    index = torch.arange(1, steps + 1)
    target = two_step_target(teacher, x_t, index, steps, ConditionedBatch(x_t, {}))
    for row in range(steps):
        t, s = (row + 1) / steps, row / steps
        twice = ddim(teacher, x_t[row : row + 1], [t, (t + s) / 2, s], {}, no_noise)
        here, there = (level(schedule, torch.tensor(time, dtype=f64), x_t) for time in (t, s))
        torch.testing.assert_close(
            ddim_step(x_t[row : row + 1], target[row : row + 1], here, there), twice, rtol=1e-4, atol=1e-5
        )


def test_nothing_is_left_to_learn_from_a_constant_teacher(schedule: Schedule, draws: Callable[[], Draws]) -> None:
    """Where `x_0` does not change along the trajectory, one DDIM step is exact however long."""
    x_0 = torch.randn(16, 2)
    loss = halving_loss(Free(x_0, schedule), Free(x_0, schedule), 4, ConditionedBatch(torch.randn(16, 2), {}), draws())
    assert float(loss) < 1e-6


def test_gradient(schedule: Schedule, draws: Callable[[], Draws]) -> None:
    """`2 max(SNR, 1) (x_hat - x_0)` per element: with one step all of the batch is at t = 1."""
    x_0, output = torch.randn(16, 2), torch.randn(16, 2, requires_grad=True)
    batch = ConditionedBatch(torch.randn(16, 2), {})
    loss = halving_loss(Free(output, schedule), Free(x_0, schedule), 1, batch, draws())
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, 2 * (output.detach() - x_0) / output.numel(), rtol=1e-3, atol=1e-4)


def test_weight_grows_with_the_signal(draws: Callable[[], Draws]) -> None:
    """On the straight-line process with 4 steps, SNR is 9 at t = 1/4, 1 at 1/2, and cut off at 1 beyond."""
    output = torch.zeros(400, 2, requires_grad=True)
    teacher = Free(torch.ones(400, 2), Flow())
    loss = halving_loss(Free(output, Flow()), teacher, 4, ConditionedBatch(torch.randn(400, 2), {}), draws())
    (gradient,) = torch.autograd.grad(loss, output)
    weights, counts = (-gradient[:, 0] * output.numel() / 2).round(decimals=2).unique(return_counts=True)
    assert weights.tolist() == pytest.approx([1, 9], abs=0.02)
    assert counts[1] / 400 == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(
    ("teacher_steps", "steps", "counts"), [(32, 1, [16, 8, 4, 2, 1]), (8, 4, [4]), (24, 3, [12, 6, 3])]
)
def test_halvings(teacher_steps: int, steps: int, counts: list[int]) -> None:
    assert halvings(teacher_steps, steps) == counts


@pytest.mark.parametrize(("teacher_steps", "steps"), [(32, 3), (4, 4), (2, 4), (6, 4), (0, 1)])
def test_teachers_that_do_not_halve_are_refused(teacher_steps: int, steps: int) -> None:
    choices = ", ".join(str(steps * factor) for factor in (8, 16, 32, 64))
    with pytest.raises(FewstepError, match=f"does not halve to a student of {steps}: give .* one of {choices}"):
        halvings(teacher_steps, steps)


def test_one_step_comes_to_do_what_eight_did(mixture: Any, point_task: Callable[..., Task]) -> None:
    """From the same noise the student of every round gives the teacher's samples, and rounds add little error."""
    task = with_data(point_task(mixture(), steps=1), mixture().sample)
    config = Config(learning_rate=5e-3, teacher_steps=8)
    target = sample(task.teacher, "ddim", uniform_times(8))
    errors, shares = {}, []
    for stage in train_stages(task, stages(task, config), 300):
        errors[stage.name] = float((samples(stage) - target).pow(2).mean().sqrt())
        shares.append(stage.share)
    assert list(errors) == ["4-steps", "2-steps", "1-steps"]
    assert sum(shares) == pytest.approx(1)
    undistilled = float((sample(task.teacher, "ddim", (1.0, 0.0)) - target).pow(2).mean().sqrt())
    assert undistilled > 0.7
    assert max(errors.values()) < 0.25
    assert errors["1-steps"] < errors["4-steps"] + 0.04


def no_noise(_: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")
