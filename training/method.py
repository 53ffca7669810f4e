"""The contract of distillation methods: what each is given, and what it hands to the trainer.

A method is one file in `methods/` with a frozen dataclass `Config` and a function `stages(task, config)`. It is pure
computation: precision, averaging, distribution, checkpoints and logging belong to the trainer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..runtime.denoiser import Condition, Denoiser, DenoiserLike, GuidedDenoiser
from .batches import ConditionedBatch
from .phase import Average, Phase


@dataclass(frozen=True)
class Copy:
    """A trainable copy of the teacher: all of its weights, or a LoRA adapter on the frozen base.

    Args:
        module: holds exactly the parameters to train.
        denoiser: the whole network with them in place.
        network: the diffusers module inside `denoiser`.
    """

    module: nn.Module
    denoiser: Denoiser
    network: nn.Module


USUAL_STEPS = (1, 2, 4, 8)
"""Step counts that are recorded for students which serve any."""


class CopyMaker(Protocol):
    """Makes trainable copies of the teacher."""

    def __call__(self, name: str, embed_guidance: bool = False) -> Copy:
        """A fresh copy that gives the teacher's output until it is trained.

        Args:
            name: of the copy (`student`, `fake`); one run has one of each name.
            embed_guidance: give the network an input for the guidance scale, taken from `condition["guidance"]` (B,).

        Raises:
            FewstepError: the family has no such input.
        """
        ...


@dataclass(frozen=True)
class Task:
    """What a method distils, and with what.

    Args:
        teacher: frozen and unguided.
        negative: condition (batch 1) of the unconditional prediction.
        guidance: the scale that the teacher is usually sampled with.
        steps: network evaluations of the student.
        sample_shape: (C, h, w) of a latent.
        batches: `batches(step, phase)` gives real latents and their conditions, for pairs that a method makes itself.
        copy: gives fresh trainable copies of the teacher.
        feature_block: of a copy's `network`: the block whose output a discriminator sees, and its channels.
        decoder: latents to images (B, 3, H, W) in [0, 1], frozen, for distances between pictures.
        folder: for what a method caches between stages.
        device: where everything is.
    """

    teacher: Denoiser
    negative: Condition
    guidance: float
    steps: int
    sample_shape: tuple[int, ...]
    batches: Callable[[int, int], ConditionedBatch]
    copy: CopyMaker
    feature_block: Callable[[nn.Module], tuple[nn.Module, int]]
    decoder: nn.Module
    folder: Path
    device: torch.device

    def scale(self, guidance: float | None) -> float:
        """A method's own `guidance`, or the usual one where it names none."""
        return self.guidance if guidance is None else guidance

    def guided(self, scale: float) -> DenoiserLike:
        """The teacher with classifier-free guidance, or itself at scale 1."""
        return self.teacher if scale == 1 else GuidedDenoiser(self.teacher, scale, self.negative)

    @property
    def other_steps(self) -> tuple[int, ...]:
        """The usual step counts without the one that is asked for."""
        return tuple(count for count in USUAL_STEPS if count != self.steps)


@dataclass(frozen=True)
class Stage:
    """One training run of a method; most methods have one, those that build on their own results several.

    Args:
        name: of its folder and of its progress bar.
        student: what it trains towards the result; its moving average goes into the next stage and into the artefact.
        phases: losses, in the order of an iteration.
        sampler: how the student is sampled, a name in `runtime.samplers.SAMPLERS`.
        times: the student's, `steps + 1` from 1 down to 0.
        guidance: of the teacher, which the student has learnt.
        guidance_range: of scales that the student takes as an input, where it has learnt more than one.
        other_times: the times of further step counts, which the student serves as well.
        averages: moving averages that the losses read.
        panel: denoisers by name whose predictions are drawn beside the guided teacher's, called with what the student
            is told; none: the student.
        share: of the training budget; the shares of all stages add up to 1.
    """

    name: str
    student: Copy
    phases: list[Phase[ConditionedBatch]]
    sampler: str
    times: tuple[float, ...]
    guidance: float
    guidance_range: tuple[float, float] | None = None
    other_times: tuple[tuple[float, ...], ...] = ()
    averages: list[Average] = field(default_factory=list)
    panel: Mapping[str, DenoiserLike] = field(default_factory=dict)
    share: float = 1.0


class Method(Protocol):
    """What each file in `methods/` offers."""

    Config: type[Any]

    def stages(self, task: Task, config: Any) -> Iterator[Stage]:
        """Yield the stages in turn; each is trained before the next is asked for.

        Raises:
            FewstepError: the teacher or the configuration does not suit the method.
        """
        ...
