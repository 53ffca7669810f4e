"""Parts of the consistency family: a function that maps every point of a trajectory to its end, learnt from a teacher.

A noised sample `x_t` is taken one solver step of the teacher nearer to the data, to `x_s`; the student at `x_t` is to
meet its own moving average at `x_s`. Methods differ in the solver.
Shapes: samples x (B, ...), times t (B,), levels shaped to multiply x.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.denoiser import Condition, DenoiserLike, GuidedDenoiser, add_noise
from ..runtime.samplers.grid import Level, level
from ..runtime.schedule import uniform_times
from .batches import ConditionedBatch
from .distances import pseudo_huber
from .method import Copy, Stage, Task
from .phase import Average, Phase

SIGMA_DATA = 0.5
TIME_SCALE = 10 * 1000
"""LCM's scale of time, 10 for each of 1000 training steps."""


@dataclass(frozen=True)
class Guidance:
    """How the teacher is guided: by one scale, or by a random one that the student is told.

    Args:
        task: has the teacher and the negative condition.
        scale: of every sample where `scale_range` is None.
        scale_range: each sample's scale is uniform in it, and goes into the student as `condition["guidance"]` (B,).
    """

    task: Task
    scale: float
    scale_range: tuple[float, float] | None = None

    def __call__(self, batch: ConditionedBatch, generator: torch.Generator) -> tuple[DenoiserLike, Condition]:
        """The guided teacher of one batch, and the condition of the student."""
        if self.scale_range is None:
            return self.task.guided(self.scale), batch.condition
        low, high = self.scale_range
        scale = low + (high - low) * torch.rand(len(batch.x_0), generator=generator, device=generator.device)
        teacher = GuidedDenoiser(self.task.teacher, scale, self.task.negative)
        return teacher, {**batch.condition, "guidance": scale}


@dataclass(frozen=True)
class Networks:
    """The two ends of the loss and the teacher between them.

    Args:
        student: a copy of the teacher.
        target: gives the value to meet, without gradient: the student's moving average, or the student itself.
        guidance: gives the teacher.
    """

    student: Copy
    target: DenoiserLike
    guidance: Guidance


class Start(NamedTuple):
    """One noised batch, and where the teacher is to take it.

    Args:
        x_t: (B, ...) samples at `here`.
        here: their levels.
        there: the next levels of the grid, the clean one included.
        teacher: guided.
        condition: of the student, which may hold the guidance scale; the teacher's is the batch's own.
    """

    x_t: Tensor
    here: Level
    there: Level
    teacher: DenoiserLike
    condition: Condition


def begin(task: Task, guidance: Guidance, target_decay: float) -> tuple[Networks, list[Average]]:
    """Fresh networks, and the moving average that the trainer is to keep: none where the student is its own target.

    Raises:
        FewstepError: the guidance has a range, and the teacher's family no input for it.
    """
    embed = guidance.scale_range is not None
    student = task.copy("student", embed)
    if target_decay == 0:
        return Networks(student, student.denoiser, guidance), []
    target = task.copy("target", embed)
    # Adapters of two copies begin with different factors of the same zero product: these cannot be averaged.
    for theirs, ours in zip(target.module.parameters(), student.module.parameters(), strict=True):
        theirs.requires_grad_(False).copy_(ours.detach())
    return Networks(student, target.denoiser, guidance), [Average(target.module, student.module, target_decay)]


def consistency_stage(
    name: str, task: Task, networks: Networks, averages: list[Average], phases: list[Phase[ConditionedBatch]]
) -> Stage:
    """The one stage of a method: its student serves the task's steps, and the usual others."""
    return Stage(
        name=name,
        student=networks.student,
        phases=phases,
        sampler="consistency",
        times=tuple(uniform_times(task.steps)),
        guidance=networks.guidance.scale,
        guidance_range=networks.guidance.scale_range,
        other_times=tuple(tuple(uniform_times(steps)) for steps in task.other_steps),
        averages=averages,
        panel={"student": networks.student.denoiser} | ({"target": networks.target} if averages else {}),
    )


def draw_start(networks: Networks, points: int, batch: ConditionedBatch, generator: torch.Generator) -> Start:
    """Noise a batch to random points of the uniform grid of `points` intervals in t."""
    x_0, schedule = batch.x_0, networks.student.denoiser.schedule
    step = torch.randint(1, points + 1, (len(x_0),), generator=generator, device=x_0.device)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    teacher, condition = networks.guidance(batch, generator)
    here, there = (level(schedule, index.to(x_0) / points, x_0) for index in (step, step - 1))
    return Start(add_noise(schedule, x_0, eps, here.t), here, there, teacher, condition)


def consistency_loss(networks: Networks, start: Start, x_s: Tensor, huber_width: float) -> tuple[Tensor, Tensor]:
    """The distance of the two predictions of a trajectory's end.

    Args:
        networks: of the method.
        start: where the student predicts.
        x_s: (B, ...) where the teacher's solver went from there; the target predicts here.
        huber_width: of the distance.

    Returns:
        The loss, and the student's prediction (B, ...) with gradient.
    """
    prediction = consistency_function(networks.student.denoiser, start.x_t, start.here.t, start.condition)
    with torch.no_grad():
        target = consistency_function(networks.target, x_s, start.there.t, start.condition)
    return huber(prediction, target, huber_width), prediction


def consistency_function(denoiser: DenoiserLike, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """`f(x, t) = c_skip x + c_out x_0(x, t)` (LCM, arXiv 2310.04378), with `f(x, 0) = x` exactly.

    From t = 0.02 on it differs from the denoiser's own `x_0` by less than 1e-5 of the sample's size, so a student
    is sampled by calling its denoiser.
    """
    skip, out = boundary_scalings(t.reshape(-1, *[1] * (x_t.ndim - 1)))
    # Chosen, not added: some networks are undefined at t = 0.
    return torch.where(out == 0, x_t, skip * x_t + out * denoiser(x_t, t, condition))


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """LCM's `c_skip` and `c_out`: (1, 0) at t = 0 and within one training step (0.001) almost (0, 1)."""
    scaled = TIME_SCALE * t
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled * total.rsqrt()


def huber(left: Tensor, right: Tensor, width: float) -> Tensor:
    """`mean(sqrt(d^2 + width^2) - width)` over all numbers of all samples: squared below `width`, absolute above."""
    return pseudo_huber((left - right).reshape(-1, 1), width).mean()
