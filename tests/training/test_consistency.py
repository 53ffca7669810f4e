"""Consistency distillation: Heun's step with a time for each sample, and its order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.samplers.grid import level
from fewstep.runtime.schedule import EDM, Flow, Schedule
from fewstep.training.method import Task
from fewstep.training.methods.consistency import Config, heun_step, stages
from fewstep.training.self_consistency import Start

TIMES = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)


def start(teacher: Any, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> Start:
    return Start(x_t, level(teacher.schedule, t, x_t), level(teacher.schedule, s, x_t), teacher, {})


@pytest.mark.parametrize("schedule", [Flow(), EDM(sigma_max=10)], ids=["flow", "edm"])
def test_step_is_the_samplers_for_each_sample(schedule: Schedule, mixture: Any) -> None:
    data = mixture(
        means=torch.tensor([[1.0, 0.6], [-1.0, 0.6]], dtype=torch.float64),
        weights=torch.tensor([0.7, 0.3], dtype=torch.float64),
        schedule=schedule,
    )
    x_t = torch.randn(5, 2, dtype=torch.float64)
    stepped = heun_step(start(data, x_t, TIMES, TIMES - TIMES[-1]), {})
    for row, t in enumerate(TIMES.tolist()):
        s = t - float(TIMES[-1])
        alone = get_sampler("heun").function(data, x_t[row, None], [t, s], {}, lambda k: x_t)
        torch.testing.assert_close(stepped[row, None], alone)
    assert torch.isfinite(stepped).all()  # the last goes to t = 0


def test_step_is_of_second_order(gaussian: Any) -> None:
    """On a Gaussian, whose flow is known, half the step leaves an eighth of the error."""
    data = gaussian(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.3)
    x_t, t = torch.randn(64, 2, dtype=torch.float64), torch.full((64,), 0.6, dtype=torch.float64)

    def error(step: float) -> float:
        s = t - step
        return float((heun_step(start(data, x_t, t, s), {}) - data.flow(x_t, t, s)).abs().max())

    assert error(0.04) / error(0.02) == pytest.approx(8, rel=0.2)


def test_stage_says_how_to_sample(gaussian: Any, point_task: Callable[..., Task]) -> None:
    (stage,) = stages(point_task(gaussian(torch.zeros(2)), steps=2), Config())
    assert (stage.sampler, stage.times) == ("consistency", (1.0, 0.5, 0.0))
    assert [phase.module for phase in stage.phases] == [stage.student.module]
