"""2-rectified flow++: the improved training of rectified flows (Lee et al. 2024, arXiv 2405.20320).

One round of reflow is enough when it trains the ends of the path most (U-shaped times), begins as the teacher seen as a
flow (`training/straight_path.py`), and measures errors by a pseudo-Huber and a perceptual distance.
Shapes: samples (B, ...), flow times s (B,).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...runtime.denoiser import DenoiserLike
from ..batches import ConditionedBatch
from ..checks import above, at_least
from ..distances import PerceptualDistance, huber_constant, load_perceptual_distance, pseudo_huber
from ..method import Stage, Task
from ..pair_regression import EARLIEST, predict_on_path
from ..pairs import PairBatch, PairsConfig, make_pairs
from ..phase import Draws, Loss, Phase
from ..straight_path import flow_times


@dataclass(frozen=True)
class Config:
    """Constants of the improved training.

    Args:
        guidance: of the teacher, None for its own.
        learning_rate: AdamW's (paper: 2e-4 for CIFAR-10, 1e-4 for ImageNet-64).
        concentration: a of the time density `exp(a s) + exp(a (1 - s))` (paper: 4).
        perceptual_weight: of the perceptual distance (paper: 1); 0 leaves the pseudo-Huber distance alone.
        pairs: made once, with the teacher.
    """

    guidance: float | None = None
    learning_rate: float = 1e-4
    concentration: float = 4.0
    perceptual_weight: float = 1.0
    pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        above(0, learning_rate=self.learning_rate, concentration=self.concentration)
        at_least(0, perceptual_weight=self.perceptual_weight)


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """The only stage: reflow of the teacher with the improved loss.

    Raises:
        FewstepError: the pairs cannot be made, or the perceptual network is not installed.
    """
    perceptual = load_perceptual_distance().to(task.device) if config.perceptual_weight else None
    student = task.copy("student")
    guidance = task.scale(config.guidance)
    pairs = make_pairs(task, task.guided(guidance), "reflow", config.pairs)

    def loss(_: ConditionedBatch, draws: Draws) -> Loss:
        batch = pairs.draw(draws)
        s = u_shaped_times(batch.path.shape[1], config.concentration, draws)
        if perceptual is None:
            return huber_loss(student.denoiser, batch, s), {}
        return combined_loss(student.denoiser, task.decoder, perceptual, config.perceptual_weight, batch, s)

    phase = Phase("student", student.module, loss, config.learning_rate)
    times = flow_times(task.teacher.schedule, task.steps)
    others = tuple(flow_times(task.teacher.schedule, steps) for steps in task.other_steps)
    yield Stage("rectified-flow-plus", student, [phase], "euler", times, guidance, other_times=others)


def u_shaped_times(count: int, concentration: float, draws: Draws) -> Tensor:
    """(count,) flow times in [EARLIEST, 1] with density `exp(a s) + exp(a (1 - s))`, by its inverse distribution.

    The distribution function is `1/2 + sinh(a (s - 1/2)) / (2 sinh(a / 2))`.
    """
    uniform = torch.rand(count, generator=draws.own, device=draws.own.device)
    s = 0.5 + torch.asinh((2 * uniform - 1) * math.sinh(concentration / 2)) / concentration
    return EARLIEST + (1 - EARLIEST) * s.clamp(0, 1)


def huber_loss(student: DenoiserLike, batch: PairBatch, s: Tensor) -> Tensor:
    """Pseudo-Huber distance of flow velocities, per element."""
    return _huber(predict_on_path(student, batch, s)[1]).mean()


def combined_loss(
    student: DenoiserLike,
    decoder: nn.Module,
    perceptual: PerceptualDistance,
    weight: float,
    batch: PairBatch,
    s: Tensor,
) -> Loss:
    """`(1 - s) huber + weight / s perceptual`, the paper's LPIPS-Huber-1/t.

    The perceptual distance compares pictures of `x_hat = y_s - s v` and of `x_0`. What is s times too small for `x_hat`
    to show near the clean end is made up for by 1/s, and near the noisy end, where pictures tell most, the
    pseudo-Huber distance fades out.
    """
    predicted, difference = predict_on_path(student, batch, s)
    huber = (1 - s) * _huber(difference)
    with torch.no_grad():
        target = decoder(batch.path[-1]).float()
    picture = perceptual(decoder(predicted).float(), target) / s
    logged = {"huber": huber.mean(), "perceptual": picture.mean()}
    return logged["huber"] + weight * logged["perceptual"], logged


def _huber(difference: Tensor) -> Tensor:
    dimension = difference[0].numel()
    return pseudo_huber(difference, huber_constant(dimension)) / dimension
