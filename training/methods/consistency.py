"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, algorithm 2): the baseline without skipping.

A consistency function is learnt from neighbouring points of a discretised trajectory, between which the guided teacher
takes one step of Heun's rule. The paper's learnt distance (LPIPS) is replaced by the pseudo-Huber distance of the
samples themselves, which needs no network and works in any latent space.
Shapes: samples x (B, ...), times t (B,).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.denoiser import Condition
from ...runtime.samplers.euler import slopes
from ..batches import ConditionedBatch
from ..checks import above, at_least, below_one
from ..method import Stage, Task
from ..phase import Draws, Loss, Phase
from ..self_consistency import Guidance, Networks, Start, begin, consistency_loss, consistency_stage, draw_start


@dataclass(frozen=True)
class Config:
    """Constants of consistency distillation.

    Args:
        guidance: of the teacher, None for its own.
        points: intervals between t = 1 and 0 (paper: 18 CIFAR-10, 40 ImageNet-64); with the 1000 that a latent
            diffusion model is trained on, this is LCM without skipping.
        target_decay: of the student's moving average that is the target (paper: 0.95 ImageNet-64, 0 CIFAR-10: the
            student itself).
        huber_width: below it the distance is squared, above absolute.
        learning_rate: AdamW's (paper: 8e-6 ImageNet-64, 4e-4 CIFAR-10).
    """

    guidance: float | None = None
    points: int = 40
    target_decay: float = 0.95
    huber_width: float = 1e-3
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        at_least(1, points=self.points)
        below_one(target_decay=self.target_decay)
        above(0, huber_width=self.huber_width, learning_rate=self.learning_rate)


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """The only stage: the student begins as the teacher, the target as the student."""
    networks, averages = begin(task, Guidance(task, task.scale(config.guidance)), config.target_decay)

    def student(batch: ConditionedBatch, draws: Draws) -> Loss:
        return loss(networks, config, batch, draws)

    phase = Phase("student", networks.student.module, student, config.learning_rate)
    yield consistency_stage("consistency", task, networks, averages, [phase])


def loss(networks: Networks, config: Config, batch: ConditionedBatch, draws: Draws) -> Loss:
    """Equation 7: the student at one point against the target at the next."""
    start = draw_start(networks, config.points, batch, draws.own)
    with torch.no_grad():
        x_s = heun_step(start, batch.condition)
    return consistency_loss(networks, start, x_s, config.huber_width)[0], {}


def heun_step(start: Start, condition: Condition) -> Tensor:
    """One step of `runtime.samplers.heun` with a time for each sample; the step to the clean level is Euler's."""
    x_t, here, there = start.x_t, start.here, start.there
    d_alpha, d_sigma = there.alpha - here.alpha, there.sigma - here.sigma
    x_0, eps = slopes(start.teacher, x_t, here, condition)
    x_s = x_t + d_alpha * x_0 + d_sigma * eps
    x_0_s, eps_s = slopes(start.teacher, x_s, there, condition)
    corrected = x_t + d_alpha * (x_0 + x_0_s) / 2 + d_sigma * (eps + eps_s) / 2
    return torch.where(there.sigma == 0, x_s, corrected)  # at the clean level no noise can be predicted
