"""What a method hands to the trainer: losses, what they train, and which moving averages they lean on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")
Loss = tuple[Tensor, dict[str, Tensor]]
"""The scalar to minimise, and scalars worth logging by name."""


@dataclass(frozen=True)
class Draws:
    """Sources of randomness of one phase of one iteration, fixed by the run's seed, the step, the phase and the shard.

    Args:
        own: differs between processes and between accumulated micro-batches: noise and times come from it.
        shared: the same in all of them: which step of a rollout is trained, say.
    """

    own: torch.Generator
    shared: torch.Generator


@dataclass(frozen=True)
class Phase(Generic[Batch]):
    """One optimiser's share of an iteration.

    Args:
        name: appears in logs and checkpoints.
        module: its parameters are trained, and only they receive gradients.
        loss: pure computation from a batch and the step's sources of randomness.
        learning_rate: peak rate of AdamW.
        every: runs in iterations that `every` divides.
        betas: AdamW's.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, Draws], Loss]
    learning_rate: float
    every: int = 1
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Average:
    """An exponential moving average that a loss reads (a consistency target, say), kept up and saved by the trainer.

    Args:
        module: shaped as `source`; never receives gradients.
        source: updated by one of the phases.
        decay: of the average, at each update of `source`.
    """

    module: nn.Module
    source: nn.Module
    decay: float
