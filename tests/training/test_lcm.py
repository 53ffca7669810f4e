"""LCM: its loss and gradient against formulas written out by hand, who learns, and what it hands to the trainer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.denoiser import Condition, Denoiser, GuidedDenoiser
from fewstep.runtime.schedule import Flow
from fewstep.training.batches import ConditionedBatch
from fewstep.training.method import Copy, Task
from fewstep.training.methods.lcm import Config, loss, stages
from fewstep.training.phase import Draws
from fewstep.training.self_consistency import Guidance, Networks, draw_start
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig


class Constant(nn.Module):
    """Predicts one and the same sample."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        return self.value.expand_as(x)


def constant(value: list[float]) -> Copy:
    network = Constant(torch.tensor(value, dtype=torch.float64))
    return Copy(network, Denoiser(network, Flow(), "sample"), network)


def test_loss_and_gradient_are_those_of_the_formulas(
    gaussian: Any, point_task: Callable[..., Task], draws: Callable[..., Draws]
) -> None:
    """On a Gaussian teacher everything but the student is known, the guided DDIM step included."""
    mean, variance, scale, width = torch.tensor([0.4, -0.2], dtype=torch.float64), 0.5, 1.0, 0.05
    data = gaussian(mean, variance)
    student, target = constant([0.3, 0.1]), constant([-0.5, 0.2])
    networks = Networks(
        student, target.denoiser, Guidance(replace(point_task(data), teacher=data, guidance=scale), scale)
    )
    config = Config(solver_steps=4, huber_width=width)
    batch = ConditionedBatch(data.sample(16, torch.Generator().manual_seed(1)), {})
    value, _ = loss(networks, config, batch, draws())
    (gradient,) = torch.autograd.grad(value, [student.module.value])

    start = draw_start(networks, 4, batch, draws().own)  # the same draws: times and noise
    x_t, t = start.x_t, start.here.t[:, None]
    s = t - 1 / 4
    alpha, sigma = 1 - t, t
    x_0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)
    eps = (x_t - alpha * x_0) / sigma
    x_s = (1 - s) * x_0 + s * eps

    def out(time: Tensor) -> Tensor:
        return 10_000 * time / ((10_000 * time) ** 2 + 0.25).sqrt()

    def skip(time: Tensor) -> Tensor:
        return 0.25 / ((10_000 * time) ** 2 + 0.25)

    prediction = skip(t) * x_t + out(t) * student.module.value
    difference = (prediction - skip(s) * x_s - out(s) * target.module.value).detach()
    root = (difference**2 + width**2).sqrt()
    torch.testing.assert_close(value.detach(), (root - width).mean())
    torch.testing.assert_close(gradient, (out(t) * difference / root).sum(0) / difference.numel())
    assert (s == 0).any()
    assert (t == 1).any()


def test_only_the_teacher_is_guided(point_task: Callable[..., Task], draws: Callable[..., Draws]) -> None:
    """Guidance of 3 between -1 and 1 aims at 5; a student that is already there stays."""

    class Conditional:
        schedule = Flow()

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return condition["where"].to(x_t)

    task = replace(point_task(Conditional()), teacher=Conditional(), negative={"where": torch.full((1, 2), -1.0)})
    batch = ConditionedBatch(torch.zeros(64, 2), {"where": torch.ones(64, 2)})
    assert isinstance(task.guided(3.0), GuidedDenoiser)

    def value(place: float) -> float:
        student = constant([place, place])
        networks = Networks(student, student.denoiser, Guidance(task, 3.0))
        return loss(networks, Config(solver_steps=1), batch, draws())[0].item()

    assert value(5.0) < 1e-6
    assert value(1.0) == pytest.approx(3.999, abs=1e-3)


def test_student_follows_the_target_and_never_pulls_it(
    gaussian: Any, point_task: Callable[..., Task], point_batch: ConditionedBatch, draws: Callable[..., Draws]
) -> None:
    """Where the student is its own target, its gradient is that of a frozen copy of itself."""
    task = point_task(gaussian(torch.zeros(2)))
    student, frozen = task.copy("student"), task.copy("target")
    frozen.module.load_state_dict(student.module.state_dict())

    def gradient(target: Denoiser) -> list[Tensor]:
        value, _ = loss(Networks(student, target, Guidance(task, 1.0)), Config(), point_batch, draws())
        return list(torch.autograd.grad(value, list(student.module.parameters())))

    torch.testing.assert_close(gradient(student.denoiser), gradient(frozen.denoiser), rtol=0, atol=0)
    assert any(bool(each.any()) for each in gradient(student.denoiser))


def test_trainer_moves_the_student_and_the_target_after_it(
    gaussian: Any, point_task: Callable[..., Task], point_batch: ConditionedBatch, tmp_path: Path
) -> None:
    (stage,) = stages(point_task(gaussian(torch.zeros(2))), Config(target_decay=0.75))
    (average,) = stage.averages
    before = nn.utils.parameters_to_vector(average.module.parameters()).clone()
    trainer = TrainerConfig(iterations=1, warmup=1, precision="no", weight_decay=0, ema_decay=0)
    train(stage.phases, lambda *_: point_batch, stage.student.module, trainer, tmp_path, averages=stage.averages)
    student = nn.utils.parameters_to_vector(stage.student.module.parameters()).detach()
    target = nn.utils.parameters_to_vector(average.module.parameters())
    assert not torch.equal(student, before)
    torch.testing.assert_close(target, 0.75 * before + 0.25 * student)


def test_stage_says_how_to_sample(gaussian: Any, point_task: Callable[..., Task]) -> None:
    task = replace(point_task(gaussian(torch.zeros(2)), steps=4), guidance=7.5)
    (stage,) = stages(task, Config())
    assert (stage.sampler, stage.times, stage.guidance) == ("consistency", (1.0, 0.75, 0.5, 0.25, 0.0), 7.5)
    assert [len(times) - 1 for times in stage.other_times] == [1, 2, 8]  # one student serves them all
    assert stage.guidance_range is None
    (stage,) = stages(task, Config(guidance=2.0, guidance_range=(1.0, 4.0)))
    assert (stage.guidance, stage.guidance_range) == (2.0, (1.0, 4.0))
