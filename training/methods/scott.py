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
from ...runtime.samplers.ddim import ddim_step
from ...runtime.samplers.grid import Level, level
from ...runtime.schedule import Schedule
from ..batches import ConditionedBatch
from ..checks import above, at_least, below_one, rising
from ..discriminator import Discriminator, make_discriminator
from ..distribution_matching import accuracy, discriminator_loss, generator_loss, noise_level, twice
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
)

LONGEST_STEP = 1.0
"""In log-SNR, of what a step counts as; on a uniform grid of a flow only the first and the last are longer."""


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
            the more the discriminator has to sharpen. On the two-dimensional mixture 0 to 0.03 are alike, 0.1 is worse
            than no noise, and 0.3 three times as far from the data in one step.
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

    def __post_init__(self) -> None:
        if self.guidance_range is not None:
            rising(0, guidance_range=self.guidance_range)
        at_least(1, solver_steps=self.solver_steps, substeps=self.substeps)
        at_least(0, eta=self.eta, generator_weight=self.generator_weight)
        below_one(target_decay=self.target_decay)
        rising(0, 1, time_range=self.time_range)
        above(0, huber_width=self.huber_width, learning_rate=self.learning_rate)
        above(0, discriminator_learning_rate=self.discriminator_learning_rate)


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """The only stage: student and discriminator begin as the teacher, the target as the student."""
    guidance = Guidance(task, task.scale(config.guidance), config.guidance_range)
    networks, averages = begin(task, guidance, config.target_decay)
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
    on_fake, on_real = _logits(judge, config, both, t, twice(batch.condition), draws.own).chunk(2)
    return discriminator_loss(on_fake, on_real), {"accuracy": accuracy(on_fake, on_real)}


def stochastic_steps(
    start: Start, config: Config, schedule: Schedule, condition: Condition, generator: torch.Generator
) -> Tensor:
    """From `here` to `there` in equal steps of t, each a step of SDE-DPM-Solver++ with fresh noise."""
    x_t, shares = start.x_t, torch.linspace(0, 1, config.substeps + 1).tolist()
    stops = [level(schedule, torch.lerp(start.here.t, start.there.t, share), x_t) for share in shares]
    for here, there in pairwise(stops):
        x_0 = start.teacher(x_t, here.t, condition)
        z = torch.randn(x_t.shape, generator=generator, device=x_t.device)
        x_t = ddim_step(refresh(x_t, x_0, z, here, there, config.eta), x_0, here, there)
    return x_t


def refresh(x_t: Tensor, x_0: Tensor, z: Tensor, here: Level, there: Level, eta: float) -> Tensor:
    """Replace as much of the predicted noise by fresh noise as one step of SDE-DPM-Solver++ does.

    What is kept is `e^{-eta h}`, where h is the step in log-SNR. Out of pure noise h is infinite, and nothing would be
    kept of the noise that a one-step student starts from, however small eta: h counts as LONGEST_STEP at most. The law
    of the samples is the same whatever the share.

    Args:
        x_t: (B, ...) samples at `here`.
        x_0: (B, ...) their predicted clean samples.
        z: (B, ...) standard normal.
        here: any level but the clean one.
        there: a lower noise level.
        eta: 0 keeps all of the noise.
    """
    step = (there.log_snr - here.log_snr).clamp_max(LONGEST_STEP)
    kept = (-eta * step).exp()
    return kept * x_t + (1 - kept) * here.alpha * x_0 + (1 - kept**2).sqrt() * here.sigma * z


def _logits(
    judge: Discriminator, config: Config, x_0: Tensor, t: Tensor, condition: Condition, generator: torch.Generator
) -> Tensor:
    """What the discriminator says of samples, noised to random levels, that are to pass for predictions made at t."""
    noise_t, eps = noise_level(x_0, config.time_range, generator)
    return judge(add_noise(judge.backbone.denoiser.schedule, x_0, eps, noise_t), noise_t, t, condition)
