"""Denoising training of a teacher; on a straight-line process, flow matching (Lipman et al. 2023, arXiv 2210.02747).

Shapes: latents x (B, C, H, W), times t (B,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.denoiser import Condition, Denoiser, add_noise
from .batches import ConditionedBatch
from .checks import above, within
from .phase import Draws, Loss, Phase


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Constants of teacher training.

    Args:
        learning_rate: peak rate of AdamW.
        dropout: share of samples trained on the negative condition, for classifier-free guidance (arXiv 2207.12598).
        time_mean: mean of the logit of t (logit-normal times, arXiv 2403.03206, eq. 19).
        time_deviation: standard deviation of that logit.
    """

    learning_rate: float = 1e-3
    dropout: float = 0.1
    time_mean: float = 0.0
    time_deviation: float = 1.0

    def __post_init__(self) -> None:
        above(0, learning_rate=self.learning_rate, time_deviation=self.time_deviation)
        within(0, 1, dropout=self.dropout)


def flow_matching_phase(
    network: nn.Module, denoiser: Denoiser, negative: Condition, config: FlowMatchingConfig
) -> Phase[ConditionedBatch]:
    """The only phase of teacher training.

    Args:
        network: the module inside `denoiser`.
        denoiser: its schedule and prediction type fix the regression target.
        negative: condition with batch 1 that stands for "no prompt".
        config: constants.
    """

    def loss(batch: ConditionedBatch, draws: Draws) -> Loss:
        x_0 = batch.x_0
        t = logit_normal_times(len(x_0), config, draws.own, x_0.device)
        dropped = torch.rand(len(x_0), generator=draws.own, device=x_0.device) < config.dropout
        condition = drop_condition(batch.condition, negative, dropped)
        value = denoising_loss(denoiser, x_0, t, condition, draws.own)
        return value, {}

    return Phase("teacher", network, loss, config.learning_rate)


def logit_normal_times(
    count: int, config: FlowMatchingConfig, generator: torch.Generator, device: torch.device
) -> Tensor:
    """(count,) times in (0, 1) whose logit is normal."""
    normal = torch.randn(count, generator=generator, device=device)
    return torch.sigmoid(config.time_mean + config.time_deviation * normal)


def denoising_loss(
    denoiser: Denoiser, x_0: Tensor, t: Tensor, condition: Condition, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the network's own prediction (eps, v, x_0 or flow velocity) at freshly noised `x_0`."""
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    x_t = add_noise(denoiser.schedule, x_0, eps, t)
    output = denoiser.network(*denoiser.network_input(x_t, t), condition)
    target = denoiser.from_sample(x_0, x_t, t)
    return functional.mse_loss(output.float(), target)


def drop_condition(condition: Condition, negative: Condition, dropped: Tensor) -> Condition:
    """Put `negative` (batch 1) in the place of the condition of the samples that `dropped` (B,) marks."""
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), negative[name].to(value), value)
        for name, value in condition.items()
    }
