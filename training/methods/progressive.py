"""Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512).

In each round the student learns to do in one DDIM step what its teacher does in two; then it is the teacher of the
next round, with half as many steps.
Shapes: samples x (B, ...), times t (B,).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.denoiser import DenoiserLike, add_noise, broadcast
from ...runtime.errors import FewstepError
from ...runtime.samplers.ddim import ddim_step
from ...runtime.samplers.grid import level
from ...runtime.schedule import uniform_times
from ..batches import ConditionedBatch
from ..checks import above, at_least
from ..method import Copy, Stage, Task
from ..phase import Draws, Loss, Phase
from ..straight_path import landing_sample


@dataclass(frozen=True)
class Config:
    """Constants of progressive distillation; every round takes an equal share of the budget.

    Args:
        guidance: of the first teacher, None for its own.
        teacher_steps: DDIM steps of the first teacher: the student's, doubled once for every round (paper: 1024 to
            8192).
        learning_rate: AdamW's, decayed in every round (paper: 1e-4 to 3e-4).
    """

    guidance: float | None = None
    teacher_steps: int = 32
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        at_least(2, teacher_steps=self.teacher_steps)
        above(0, learning_rate=self.learning_rate)


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """One stage a round, all of the same student.

    Raises:
        FewstepError: `teacher_steps` is not the student's steps, doubled at least once.
    """
    counts = halvings(config.teacher_steps, task.steps)
    student = task.copy("student")
    guidance = task.scale(config.guidance)
    teacher: DenoiserLike = task.guided(guidance)
    snapshot: Copy | None = None
    for steps in counts:
        phase = round_phase(student, teacher, steps, config.learning_rate)
        times = tuple(uniform_times(steps))
        panel = {"student": student.denoiser, "round's teacher": teacher} if snapshot else {}
        yield Stage(f"{steps}-steps", student, [phase], "ddim", times, guidance, panel=panel, share=1 / len(counts))
        if steps != task.steps:
            snapshot = snapshot or task.copy("teacher")
            snapshot.module.load_state_dict(student.module.state_dict())
            teacher = snapshot.denoiser


def halvings(teacher_steps: int, steps: int) -> list[int]:
    """Steps of the student in each round, down to `steps`.

    Raises:
        FewstepError: `teacher_steps` is not `steps`, doubled at least once.
    """
    counts = [teacher_steps // 2]
    while counts[-1] > steps:
        counts.append(counts[-1] // 2)
    if steps * 2 ** len(counts) != teacher_steps:
        doubled = ", ".join(str(steps * 2**power) for power in range(3, 7))
        raise FewstepError(
            f"a teacher of {teacher_steps} steps does not halve to a student of {steps}: give teacher_steps as one of "
            f"{doubled}"
        )
    return counts


def round_phase(student: Copy, teacher: DenoiserLike, steps: int, learning_rate: float) -> Phase[ConditionedBatch]:
    """One round: the student's `steps` steps against twice as many of the teacher's."""

    def loss(batch: ConditionedBatch, draws: Draws) -> Loss:
        return halving_loss(student.denoiser, teacher, steps, batch, draws), {}

    return Phase("student", student.module, loss, learning_rate)


def halving_loss(
    student: DenoiserLike, teacher: DenoiserLike, steps: int, batch: ConditionedBatch, draws: Draws
) -> Tensor:
    """Algorithm 2 with the truncated-SNR weight `max(alpha^2 / sigma^2, 1)` (eq. 9) on the error of `x_0`."""
    x_0, own = batch.x_0, draws.own
    index = torch.randint(1, steps + 1, (len(x_0),), generator=own, device=own.device)
    eps = torch.randn(x_0.shape, generator=own, device=own.device)
    t, schedule = index / steps, student.schedule
    x_t = add_noise(schedule, x_0, eps, t)
    target = two_step_target(teacher, x_t, index, steps, batch)
    error = (student(x_t, t, batch.condition).float() - target).pow(2)
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    return (broadcast(snr.clamp_min(1), error) * error).mean()


@torch.no_grad()
def two_step_target(teacher: DenoiserLike, x_t: Tensor, index: Tensor, steps: int, batch: ConditionedBatch) -> Tensor:
    """The clean sample with which one DDIM step from `x_t`, at t = index / steps, lands where the teacher's two do."""
    here, middle, there = (level(teacher.schedule, (2 * index - back) / (2 * steps), x_t) for back in (0, 1, 2))
    x_middle = ddim_step(x_t, teacher(x_t, here.t, batch.condition).float(), here, middle)
    x_s = ddim_step(x_middle, teacher(x_middle, middle.t, batch.condition).float(), middle, there)
    return landing_sample(x_t, x_s, here, there)
