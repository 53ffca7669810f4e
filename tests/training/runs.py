"""Small trainings for tests of the trainer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.training.phase import Draws, Loss, Phase
from fewstep.training.trainer_config import TrainerConfig

CONFIG = TrainerConfig(iterations=12, seed=3, warmup=4, precision="no", checkpoint_minutes=0, log_every=1)
STEADY = replace(CONFIG, warmup=1, decay=0.0, weight_decay=0.0)
Batches = Callable[[int, int], Tensor]


def batches(step: int, phase: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + phase))


def stop_at(step: int, source: Batches = batches) -> Batches:
    """Batches that end in Ctrl-C."""

    def interrupted(current: int, phase: int) -> Tensor:
        if current == step:
            raise KeyboardInterrupt
        return source(current, phase)

    return interrupted


def two_phases(seed: int = 0, device: str = "cpu") -> tuple[list[Phase[Tensor]], nn.Module]:
    """A student that follows a critic, the critic follows the data; the student runs every other time."""
    torch.manual_seed(seed)
    student, critic = nn.Linear(3, 3).to(device), nn.Sequential(nn.Linear(3, 3), nn.Tanh()).to(device)

    def critic_loss(batch: Tensor, draws: Draws) -> Loss:
        noise = torch.randn(batch.shape, generator=draws.own, device=device)
        return (critic(batch + noise) - batch).pow(2).mean(), {}

    def student_loss(batch: Tensor, draws: Draws) -> Loss:
        noise = torch.randn(batch.shape, generator=draws.own, device=device)
        value = (critic(student(noise)) - batch).pow(2).mean()
        return value, {"twice": 2 * value}

    return [Phase("critic", critic, critic_loss, 1e-2), Phase("student", student, student_loss, 3e-3, every=2)], student


def linear_phase(
    loss: Callable[[Tensor], Tensor] | None = None, **fields: Any
) -> tuple[list[Phase[Tensor]], nn.Linear]:
    module = nn.Linear(3, 1)

    def default(batch: Tensor, draws: Draws) -> Loss:
        return (loss(module(batch)) if loss else module(batch).pow(2).mean()), {}

    return [Phase("only", module, default, **{"learning_rate": 0.1, **fields})], module
