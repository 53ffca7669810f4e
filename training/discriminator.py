"""A discriminator that knows prompt and time (SCott, arXiv 2403.01505): a teacher's features, and a head on them.

A consistency function's predictions get worse with the time they are made at, so the head is told this time: it judges
one-step samples by their own kind, not by the easy predictions near t = 0.
Shapes: noised samples x (B, ...), times (B,), logits (B,).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..runtime.denoiser import Condition
from .distribution_matching import call_with_features
from .method import Copy, Task

TIME_FEATURES = 32


class ConditionalHead(nn.Module):
    """Projection head (Miyato and Koyama 2018, arXiv 1802.05637): `w . h(features) + V(text, t) . h(features)`.

    `h` looks at each position alone, since the network before it has mixed them, and is averaged over positions.

    Args:
        channels: of the features.
        text_channels: of the pooled prompt; 0 where there are no prompts.
        hidden: width of the head.
    """

    def __init__(self, channels: int, text_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.SiLU())
        self.logit = nn.Linear(hidden, 1)
        self.projection = nn.Sequential(
            nn.Linear(text_channels + TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )

    def forward(self, features: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """Logits (B,).

        Args:
            features: (B, C), tokens (B, L, C) or maps (B, C, H, W).
            text: (B, text_channels).
            t: (B,) in [0, 1].
        """
        pooled = self.layers(as_tokens(features)).mean(1)
        steering = self.projection(torch.cat([text, time_features(t)], dim=1))
        logits: Tensor = self.logit(pooled).squeeze(1) + (steering * pooled).sum(1) / math.sqrt(pooled.shape[1])
        return logits


@dataclass(frozen=True)
class Discriminator:
    """Features of a copy of the teacher at mid-depth, and the head that judges them.

    Args:
        backbone: its weights are trained too; with LoRA copies this is SCott's LoRA discriminator.
        block: inside the backbone; its output is what the head sees.
        head: gives the logits.
    """

    backbone: Copy
    block: nn.Module
    head: ConditionalHead

    @property
    def module(self) -> nn.ModuleDict:
        """Everything to train."""
        return nn.ModuleDict({"backbone": self.backbone.module, "head": self.head})

    def __call__(self, x: Tensor, noise_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits (B,), positive for real samples; gradients flow to `x`.

        Args:
            x: (B, ...) samples noised to `noise_t`.
            noise_t: (B,) time of the backbone.
            t: (B,) time that the predictions were made at, and that real samples are to pass for.
            condition: of the batch.
        """
        denoiser = self.backbone.denoiser

        def call() -> Tensor:
            return denoiser.network(*denoiser.network_input(x, noise_t), condition)

        _, features = call_with_features(self.block, call)
        logits: Tensor = self.head(features, pooled_text(condition, x), t)
        return logits.float()


def make_discriminator(task: Task) -> Discriminator:
    """A discriminator that begins on the teacher's features, with a fresh head."""
    backbone = task.copy("discriminator")
    block, channels = task.feature_block(backbone.network)
    text = task.negative.get("encoder_hidden_states")
    head = ConditionalHead(channels, 0 if text is None else text.shape[-1])
    return Discriminator(backbone, block, head.to(task.device))


def pooled_text(condition: Condition, x: Tensor) -> Tensor:
    """Mean of the prompt's token states (B, D), padding left out; (B, 0) for a condition without text."""
    if "encoder_hidden_states" not in condition:
        return x.new_zeros(len(x), 0)
    states = condition["encoder_hidden_states"]
    mask = condition.get("encoder_attention_mask", torch.ones_like(states[..., 0])).to(states).unsqueeze(-1)
    return (mask * states).sum(1) / mask.sum(1).clamp_min(1)


def time_features(t: Tensor) -> Tensor:
    """(B, 32) sines and cosines of t (B,) in [0, 1], with periods from 0.01 to 10."""
    frequencies = 2 * math.pi * torch.logspace(-1, 2, TIME_FEATURES // 2, device=t.device, dtype=t.dtype)
    angle = t[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def as_tokens(features: Tensor) -> Tensor:
    """Features (B, C), (B, L, C) or (B, C, H, W) as tokens (B, L, C)."""
    if features.ndim == 2:
        return features.unsqueeze(1)
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
