"""Parts of the distribution-matching family: its loss, and the discriminator on the fake network's own features."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.denoiser import Condition


def gradient_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to `x` is `gradient / x.numel()`: `0.5 mse(x, sg(x - gradient))`."""
    return 0.5 * functional.mse_loss(x, (x - gradient).detach())


def noise_level(x: Tensor, time_range: tuple[float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times t (B,), uniform in `time_range`, and eps shaped as x, to noise samples x (B, ...) with."""
    low, high = time_range
    t = low + (high - low) * torch.rand(len(x), generator=generator, device=x.device)
    return t, torch.randn(x.shape, generator=generator, device=x.device)


def twice(condition: Condition) -> Condition:
    """The condition of a batch that holds every prompt twice: students' samples, then real ones."""
    return {name: torch.cat([value, value]) for name, value in condition.items()}


class FeatureHead(nn.Module):
    """Discriminator head of DMD2 (arXiv 2405.14867, section 4.3): features to one logit.

    Args:
        channels: of the features.
        hidden: width of the head.
    """

    def __init__(self, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 4, stride=2, padding=1),
            nn.GroupNorm(8, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 4, stride=2, padding=1),
            nn.GroupNorm(8, hidden),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B,) of features (B, C, H, W) or of square token grids (B, H * W, C)."""
        logits: Tensor = self.layers(as_map(features))
        return logits.flatten()


def as_map(features: Tensor) -> Tensor:
    """Token features (B, H * W, C) of a square grid as a map (B, C, H, W); maps pass through."""
    if features.ndim == 4:
        return features
    batch, tokens, channels = features.shape
    side = math.isqrt(tokens)
    return features.transpose(1, 2).reshape(batch, channels, side, side)


def call_with_features(block: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Run `call`, and also return what `block` put out during it."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        caught.append(output if isinstance(output, Tensor) else output[0])

    handle = block.register_forward_hook(catch)
    try:
        return call(), caught[0]
    finally:
        handle.remove()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """`softplus(D(fake)) + softplus(-D(real))`, averaged (non-saturating GAN)."""
    return functional.softplus(fake).mean() + functional.softplus(-real).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """`softplus(-D(fake))`, averaged."""
    return functional.softplus(-fake).mean()


def accuracy(fake: Tensor, real: Tensor) -> Tensor:
    """Share of the logits with the right sign, fake and real samples counting alike."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
