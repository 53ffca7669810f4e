"""Losses on cached pairs: the velocity along straight paths, and the step from one point of a trajectory to the next.

Both compare velocities of the matched flow (`straight_path.py`), so they weigh errors alike for every process and
prediction type.
Shapes: samples x (B, ...), times (B,).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.denoiser import DenoiserLike
from ..runtime.samplers.grid import level
from .batches import ConditionedBatch
from .method import Copy
from .pairs import PairBatch, Pairs
from .phase import Draws, Loss, Phase
from .straight_path import from_flow_time, landing_sample, straight_point, velocity_difference

EARLIEST = 0.01
"""Flow times of training begin here: closer to 0 the velocity of an `x_0`-prediction is nothing but its rounding."""


def uniform_flow_times(count: int, draws: Draws) -> Tensor:
    """(count,) even in [EARLIEST, 1]."""
    uniform = torch.rand(count, generator=draws.own, device=draws.own.device)
    return EARLIEST + (1 - EARLIEST) * uniform


def predict_on_path(student: DenoiserLike, batch: PairBatch, s: Tensor) -> tuple[Tensor, Tensor]:
    """Ask the student on the straight path of each pair, at flow times s (B,).

    Returns:
        Its `x_0` (B, ...), and how far its flow velocity is from the pair's own, `z - x_0` (B, ...).
    """
    x_T, x_0 = batch.path[0], batch.path[-1]
    t = from_flow_time(student.schedule, s)
    predicted = student(straight_point(student.schedule, x_0, x_T, t), t, batch.condition).float()
    return predicted, velocity_difference(student.schedule, predicted, x_0, t)


def reflow_loss(student: DenoiserLike, batch: PairBatch, s: Tensor) -> Tensor:
    """`|v(y_s, s) - (z - x_0)|^2` on pairs (arXiv 2209.03003, eq. 1), averaged over elements."""
    return predict_on_path(student, batch, s)[1].pow(2).mean()


def segment_loss(student: DenoiserLike, batch: PairBatch, times: Sequence[float], draws: Draws) -> Tensor:
    """Squared error of the velocity that leads from a segment's start to its end (arXiv 2209.03003).

    Each sample trains one of its trajectory's segments, drawn at random. The loss is 0 where one step of Euler or DDIM
    from the start lands on the end.

    Args:
        student: predicts `x_0`.
        batch: trajectories with a point at each of `times`.
        times: of the process, from 1 down to 0.
        draws: the segments come from the own source.
    """
    count, own = batch.path.shape[1], draws.own
    segment = torch.randint(len(times) - 1, (count,), generator=own, device=own.device)
    sample = torch.arange(count, device=own.device)
    x_t, x_s = batch.path[segment, sample], batch.path[segment + 1, sample]
    grid = torch.tensor(times, device=x_t.device)
    t, s = grid[segment], grid[segment + 1]
    here, there = (level(student.schedule, time, x_t) for time in (t, s))
    target = landing_sample(x_t, x_s, here, there)
    predicted = student(x_t, t, batch.condition).float()
    return velocity_difference(student.schedule, predicted, target, t).pow(2).mean()


def regression_phase(student: Copy, pairs: Pairs, learning_rate: float) -> Phase[ConditionedBatch]:
    """Teach the student to go from each of the pairs' times to the next in one step; real data plays no part.

    On pairs at times (1, 0) it regresses the sample from its noise: distillation to one step, or the warm-up of a
    one-step student (DMD2, arXiv 2405.14867).
    """

    def loss(_: ConditionedBatch, draws: Draws) -> Loss:
        return segment_loss(student.denoiser, pairs.draw(draws), pairs.times, draws), {}

    return Phase("student", student.module, loss, learning_rate)
