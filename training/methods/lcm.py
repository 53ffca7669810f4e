"""LCM: latent consistency distillation (Luo et al. 2023, arXiv 2310.04378), and LCM-LoRA (arXiv 2311.05556).

A consistency function is learnt over a coarse grid of times, one DDIM step of the guided teacher at a time: each step
skips 20 of the 1000 times that Stable Diffusion is trained on.
Shapes: samples x (B, ...), times t (B,).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...runtime.samplers.ddim import ddim_step
from ..batches import ConditionedBatch
from ..checks import above, at_least, below_one, rising
from ..method import Stage, Task
from ..phase import Draws, Loss, Phase
from ..self_consistency import Guidance, Networks, begin, consistency_loss, consistency_stage, draw_start


@dataclass(frozen=True)
class Config:
    """Constants of LCM.

    Args:
        guidance: of the teacher, None for its own; with a range, what the student is sampled with by default.
        guidance_range: train for all scales in it (paper: 3 to 15), which gives the student an input for the scale;
            None trains for `guidance` alone.
        solver_steps: DDIM steps from t = 1 to 0 (paper: 50).
        target_decay: of the student's moving average that is the target (paper: 0.95); 0 makes the student its own
            target, as LCM-LoRA does.
        huber_width: below it the distance is squared, above absolute (diffusers: 1e-3).
        learning_rate: AdamW's (paper: 8e-6; LCM-LoRA 1e-4).
    """

    guidance: float | None = None
    guidance_range: tuple[float, float] | None = None
    solver_steps: int = 50
    target_decay: float = 0.95
    huber_width: float = 1e-3
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.guidance_range is not None:
            rising(0, guidance_range=self.guidance_range)
        at_least(1, solver_steps=self.solver_steps)
        below_one(target_decay=self.target_decay)
        above(0, huber_width=self.huber_width, learning_rate=self.learning_rate)


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """The only stage: the student begins as the teacher, the target as the student."""
    guidance = Guidance(task, task.scale(config.guidance), config.guidance_range)
    networks, averages = begin(task, guidance, config.target_decay)

    def student(batch: ConditionedBatch, draws: Draws) -> Loss:
        return loss(networks, config, batch, draws)

    phase = Phase("student", networks.student.module, student, config.learning_rate)
    yield consistency_stage("lcm", task, networks, averages, [phase])


def loss(networks: Networks, config: Config, batch: ConditionedBatch, draws: Draws) -> Loss:
    """Algorithm 1: the student before one DDIM step of the teacher against the target after it."""
    start = draw_start(networks, config.solver_steps, batch, draws.own)
    with torch.no_grad():
        x_0 = start.teacher(start.x_t, start.here.t, batch.condition)
        x_s = ddim_step(start.x_t, x_0, start.here, start.there)
    return consistency_loss(networks, start, x_s, config.huber_width)[0], {}
