"""Rectified flow: reflow and k-step distillation (Liu et al. 2022, arXiv 2209.03003; InstaFlow, arXiv 2309.06380).

Each round of reflow trains the flow on straight lines between noise and what the flow before it makes of that noise,
which straightens it; distillation then teaches each of the student's steps where its stretch of the trajectory ends.
The first flow is the teacher, whatever its process (`training/straight_path.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...runtime.denoiser import DenoiserLike
from ..batches import ConditionedBatch
from ..checks import above, at_least
from ..method import Copy, Stage, Task
from ..pair_regression import reflow_loss, regression_phase, uniform_flow_times
from ..pairs import Pairs, PairsConfig, make_pairs
from ..phase import Draws, Loss, Phase
from ..straight_path import flow_times


@dataclass(frozen=True)
class Config:
    """Constants of rectified flow; every round and the distillation take an equal share of the budget.

    Args:
        guidance: of the teacher, None for its own (InstaFlow: 1.5 for SD1.5).
        rounds: of reflow before the distillation (paper: 1 or 2; 0 distils the teacher directly).
        learning_rate: AdamW's (paper: 2e-4 for CIFAR-10; InstaFlow: 6.5e-5).
        pairs: made anew for every round and for the distillation, each time with the flow as it is then.
    """

    guidance: float | None = None
    rounds: int = 1
    learning_rate: float = 1e-4
    pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        at_least(0, rounds=self.rounds)
        above(0, learning_rate=self.learning_rate)


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """Rounds of reflow, then distillation, all of the same student.

    Raises:
        FewstepError: the pairs cannot be made.
    """
    student = task.copy("student")
    times = flow_times(task.teacher.schedule, task.steps)
    guidance = task.scale(config.guidance)
    share = 1 / (config.rounds + 1)
    flow: DenoiserLike = task.guided(guidance)
    for number in range(1, config.rounds + 1):
        name = f"reflow-{number}"
        phase = reflow_phase(student, make_pairs(task, flow, name, config.pairs), config.learning_rate)
        yield Stage(name, student, [phase], "euler", times, guidance, share=share)
        flow = student.denoiser
    pairs = make_pairs(task, flow, "distillation", config.pairs, times)
    phase = regression_phase(student, pairs, config.learning_rate)
    yield Stage("distillation", student, [phase], "euler", times, guidance, share=share)


def reflow_phase(student: Copy, pairs: Pairs, learning_rate: float) -> Phase[ConditionedBatch]:
    """Flow matching between the ends of cached pairs; real data plays no part."""

    def loss(_: ConditionedBatch, draws: Draws) -> Loss:
        batch = pairs.draw(draws)
        return reflow_loss(student.denoiser, batch, uniform_flow_times(batch.path.shape[1], draws)), {}

    return Phase("student", student.module, loss, learning_rate)
