"""Improved training of rectified flows: time density, loss, and that points reach the teacher's distribution."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.schedule import Flow, Schedule
from fewstep.training.distances import PerceptualDistance, huber_constant, pseudo_huber
from fewstep.training.method import Task
from fewstep.training.methods.rectified_flow_plus import Config, combined_loss, huber_loss, stages, u_shaped_times
from fewstep.training.pair_regression import EARLIEST
from fewstep.training.pairs import PairBatch, PairsConfig
from fewstep.training.phase import Draws
from fewstep.training.straight_path import flow_times

from .points import Free, sample, samples, seeded, sliced_distance, train_stages, with_data

f64 = torch.float64


@pytest.mark.parametrize("concentration", [1.0, 4.0])
def test_times_have_the_u_shaped_density(concentration: float, draws: Callable[[], Draws]) -> None:
    """The largest gap of the empirical distribution function to `exp(a s) + exp(a (1 - s))`, integrated by sums."""
    count = 20_000
    s = (u_shaped_times(count, concentration, draws()).double() - EARLIEST) / (1 - EARLIEST)
    grid = torch.linspace(0, 1, 2001, dtype=f64)
    density = (concentration * grid).exp() + (concentration * (1 - grid)).exp()
    distribution = torch.cumulative_trapezoid(density, grid)
    distribution = torch.cat([torch.zeros(1, dtype=f64), distribution / distribution[-1]])
    empirical = torch.searchsorted(s.sort().values, grid) / count
    assert float((empirical - distribution).abs().max()) < 1.63 / math.sqrt(count)  # Kolmogorov's 1% bound
    moment = 0.25 - 1 / (concentration * math.tanh(concentration / 2)) + 2 / concentration**2
    assert float(((s - 0.5) ** 2).mean()) == pytest.approx(moment, rel=0.02)


def test_huber_loss_is_that_of_flow_velocities(schedule: Schedule) -> None:
    x_0, x_T, guess = torch.randn(3, 8, 3, dtype=f64)
    s = 0.1 + 0.9 * torch.rand(8, dtype=f64)
    loss = huber_loss(Free(guess, schedule), PairBatch(torch.stack([x_T, x_0]), {}), s)
    velocities = pseudo_huber((x_0 - guess) / s[:, None], huber_constant(3)) / 3
    torch.testing.assert_close(loss, velocities.mean(), rtol=1e-4, atol=0)
    assert huber_loss(Free(x_0.float().double(), schedule), PairBatch(torch.stack([x_T, x_0.float()]), {}), s) == 0


class TinyDecoder(nn.Module):
    """Points (B, 2) to pictures (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3 * 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x)).reshape(-1, 3, 8, 8)


def test_combined_loss_is_the_papers() -> None:
    """`(1 - s) huber(z - x_0, v) + perceptual(x_0, y_s - s v) / s`, and nothing but the student learns from it."""
    perceptual, decoder = PerceptualDistance([nn.Conv2d(3, 4, 3)]), TinyDecoder().requires_grad_(False)
    x_0, z, v = torch.randn(3, 8, 2)
    s = 0.1 + 0.9 * torch.rand(8)
    y = (1 - s[:, None]) * x_0 + s[:, None] * z
    x_hat = (y - s[:, None] * v).requires_grad_(True)
    loss, parts = combined_loss(Free(x_hat, Flow()), decoder, perceptual, 0.5, PairBatch(torch.stack([z, x_0]), {}), s)
    huber = (1 - s) * pseudo_huber(v - (z - x_0), huber_constant(2)) / 2
    pictures = perceptual(decoder(x_hat), decoder(x_0)) / s
    torch.testing.assert_close(parts["huber"], huber.mean(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss, (huber + 0.5 * pictures).mean(), rtol=1e-3, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, x_hat)
    assert gradient.abs().min() > 0


def test_combined_loss_is_done_at_the_pairs_own_samples() -> None:
    perceptual, decoder = PerceptualDistance([nn.Conv2d(3, 4, 3)]), TinyDecoder().requires_grad_(False)
    x_0, z = torch.randn(2, 8, 2)
    output = x_0.clone().requires_grad_(True)
    pair = PairBatch(torch.stack([z, x_0]), {})
    loss, _ = combined_loss(Free(output, Flow()), decoder, perceptual, 1.0, pair, torch.rand(8).clamp_min(EARLIEST))
    (gradient,) = torch.autograd.grad(loss, output)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-4


def test_student_learns_the_distribution_of_an_analytic_teacher(mixture: Any, point_task: Callable[..., Task]) -> None:
    """In one stage, without the perceptual term; two draws of 4,000 samples of the data itself lie 0.016 apart."""
    teacher = mixture()
    data = teacher.sample(4000, seeded(1))
    task = with_data(point_task(teacher), teacher.sample)
    config = Config(learning_rate=5e-3, perceptual_weight=0, pairs=PairsConfig(128 * 32, "heun", 12))
    (stage,) = train_stages(task, stages(task, config), 400)
    assert stage.share == 1
    coarse = sliced_distance(sample(task.teacher, "euler", flow_times(Flow(), 1)), data)
    for steps in (1, 2):
        few = replace(stage, times=flow_times(Flow(), steps))
        after = sliced_distance(samples(few), data)
        assert after < 0.12
        assert after < coarse / 3
