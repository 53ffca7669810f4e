"""SCott: stochastic consistency distillation (Liu et al. 2024, arXiv 2403.01505).

LCM's loop with a stochastic solver in the place of DDIM: the teacher goes from one time of the grid to the next in
several steps of SDE-DPM-Solver++, with noise of adjustable strength. A discriminator that knows the prompt and the
noise level adds real data. Without noise, with one step and no discriminator, this is LCM.
Shapes: samples x (B, ...), times t (B,).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...runtime.denoiser import Condition, add_noise
from ...runtime.samplers.sde_dpm_solver import sde_step
from ...runtime.schedule import Schedule
from ..batches import ConditionedBatch
from ..discriminator import Discriminator, make_discriminator
from ..distribution_matching import discriminator_loss, generator_loss
from ..method import Stage, Task
from ..phase import Draws, Loss, Phase
from ..self_consistency import (
    Guidance,
    Networks,
    Start,
    begin,
    consistency_function,
    consistency_loss,
    consistency_stage,
    draw_start,
    level,
)


@dataclass(frozen=True)
class Config:
    """Constants of SCott.

    Args:
        guidance: of the teacher, None for its own; with a range, what the student is sampled with by default.
        guidance_range: train for all scales in it, which gives the student an input for the scale; None trains for
            `guidance` alone.
        solver_steps: times of the grid between t = 1 and 0; the teacher goes from each to the next.
        substeps: of the solver between two times of the grid (paper: 3).
        eta: strength of the solver's fresh noise: 0 for the probability flow, 1 for the reverse of the diffusion (the
            square of the paper's). A noisy path has many ends, of which the student learns the middle: the more noise,
            the more the discriminator has to sharpen, above all at one step.
        target_decay: of the student's moving average that is the target (paper: 0.95); 0 makes the student its own.
        huber_width: below it the distance is squared, above absolute.
        generator_weight: of the adversarial term in the student's loss (paper: 0.4).
        time_range: t of the noise on what the discriminator sees is uniform in it.
        learning_rate: AdamW's (paper: 8e-6).
        discriminator_learning_rate: AdamW's (paper: 2e-5).
    """

    guidance: float | None = None
    guidance_range: tuple[float, float] | None = None
    solver_steps: int = 50
    substeps: int = 2
    eta: float = 0.01
    target_decay: float = 0.95
    huber_width: float = 1e-3
    generator_weight: float = 0.4
    time_range: tuple[float, float] = (0.02, 0.98)
    learning_rate: float = 1e-4
    discriminator_learning_rate: float = 2.5e-4


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """The only stage: student and discriminator begin as the teacher, the target as the student."""
    scale = task.guidance if config.guidance is None else config.guidance
    networks, averages = begin(task, Guidance(task, scale, config.guidance_range), config.target_decay)
    yield consistency_stage("scott", task, networks, averages, phases(networks, make_discriminator(task), config))


def phases(networks: Networks, judge: Discriminator, config: Config) -> list[Phase[ConditionedBatch]]:
    """The discriminator's turn and the student's, in every iteration."""

    def discriminator(batch: ConditionedBatch, draws: Draws) -> Loss:
        return judge_loss(networks, judge, config, batch, draws)

    def student(batch: ConditionedBatch, draws: Draws) -> Loss:
        return student_loss(networks, judge, config, batch, draws)

    return [
        Phase("discriminator", judge.module, discriminator, config.discriminator_learning_rate, betas=(0.0, 0.99)),
        Phase("student", networks.student.module, student, config.learning_rate),
    ]


def student_loss(
    networks: Networks, judge: Discriminator, config: Config, batch: ConditionedBatch, draws: Draws
) -> Loss:
    """Consistency along the stochastic trajectory, plus the generator's side of the GAN on the same prediction."""
    start = draw_start(networks, config.solver_steps, batch, draws.own)
    with torch.no_grad():
        x_s = stochastic_steps(start, config, networks.student.denoiser.schedule, batch.condition, draws.own)
    consistency, prediction = consistency_loss(networks, start, x_s, config.huber_width)
    adversarial = generator_loss(_logits(judge, config, prediction, start.here.t, batch.condition, draws.own))
    loss = consistency + config.generator_weight * adversarial
    return loss, {"consistency": consistency, "adversarial": adversarial}


def judge_loss(networks: Networks, judge: Discriminator, config: Config, batch: ConditionedBatch, draws: Draws) -> Loss:
    """The discriminator's side: real samples against the student's predictions, from anywhere on the trajectory."""
    start = draw_start(networks, config.solver_steps, batch, draws.own)
    with torch.no_grad():
        prediction = consistency_function(networks.student.denoiser, start.x_t, start.here.t, start.condition)
    both = torch.cat([prediction, batch.x_0])
    t = torch.cat([start.here.t, start.here.t])
    condition = {name: torch.cat([value, value]) for name, value in batch.condition.items()}
    on_fake, on_real = _logits(judge, config, both, t, condition, draws.own).chunk(2)
    accuracy = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
    return discriminator_loss(on_fake, on_real), {"accuracy": accuracy}


def stochastic_steps(
    start: Start, config: Config, schedule: Schedule, condition: Condition, generator: torch.Generator
) -> Tensor:
    """From `here` to `there` in equal steps of t, each a step of SDE-DPM-Solver++ with fresh noise."""
    x_t, shares = start.x_t, torch.linspace(0, 1, config.substeps + 1).tolist()
    stops = [level(schedule, torch.lerp(start.here.t, start.there.t, share), x_t) for share in shares]
    for here, there in pairwise(stops):
        x_0 = start.teacher(x_t, here.t, condition)
        z = torch.randn(x_t.shape, generator=generator, device=x_t.device)
        x_t = sde_step(x_t, x_0, z, here, there, config.eta)
    return x_t


def _logits(
    judge: Discriminator, config: Config, x_0: Tensor, t: Tensor, condition: Condition, generator: torch.Generator
) -> Tensor:
    """What the discriminator says of samples, noised to random levels, that are to pass for predictions made at t."""
    low, high = config.time_range
    noise_t = low + (high - low) * torch.rand(len(x_0), generator=generator, device=x_0.device)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    return judge(add_noise(judge.backbone.denoiser.schedule, x_0, eps, noise_t), noise_t, t, condition)
