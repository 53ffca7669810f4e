"""The built-in teacher's network."""

from dataclasses import dataclass

from torch import nn

from ..runtime.errors import FewstepError
from .checks import at_least


@dataclass(frozen=True)
class TeacherConfig:
    """Shape of the built-in teacher, a small `SanaTransformer2DModel`: 6.9M parameters, 64 tokens for 64x64 pixels.

    Args:
        layers: transformer blocks.
        heads: attention heads of 32 channels, an even number.
        guidance: the scale that samples are shown and students distilled with.
    """

    layers: int = 6
    heads: int = 8
    guidance: float = 3.0

    def __post_init__(self) -> None:
        at_least(1, layers=self.layers)
        at_least(0, guidance=self.guidance)
        if self.heads < 2 or self.heads % 2:
            raise FewstepError(f"{self.heads} heads are not possible: give an even number")


def build_teacher(config: TeacherConfig, channels: int, size: int) -> nn.Module:
    """A freshly initialised transformer for latents (channels, size, size)."""
    from diffusers import SanaTransformer2DModel

    width = 32 * config.heads
    model: nn.Module = SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=config.heads,
        attention_head_dim=32,
        num_layers=config.layers,
        num_cross_attention_heads=config.heads // 2,
        cross_attention_head_dim=64,
        cross_attention_dim=width,
        caption_channels=384,
        mlp_ratio=2.5,
        sample_size=size,
        patch_size=1,
        interpolation_scale=1,
    )
    return model
