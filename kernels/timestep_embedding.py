"""The embedding of a time: the sinusoids of DDPM (arXiv 2006.11239) and two layers."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import runs_triton


def timestep_embedding(
    t: Tensor,
    channels: int,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    flip_sin_to_cos: bool = True,
    downscale_frequency_shift: float = 0.0,
    scale: float = 1.0,
    max_period: int = 10000,
) -> Tensor:
    """Sinusoids, linear, SiLU, linear, as diffusers' `Timesteps` and `TimestepEmbedding` do them.

    Where autograd follows one of the tensors, torch does the work; the kernel is for inference.

    Args:
        t: (B,) times in the network's own unit, of any dtype.
        channels: C of the sinusoids.
        weight_1: (H, C).
        bias_1: (H,).
        weight_2: (D, H).
        bias_2: (D,).
        flip_sin_to_cos: cosines first.
        downscale_frequency_shift: the last frequency is `1 / max_period` with 1, one step above it with 0.
        scale: of the angles.
        max_period: of the slowest sinusoid, divided by 2 pi.

    Returns:
        (B, D) in the dtype of `weight_2`.
    """
    layers = (weight_1, bias_1, weight_2, bias_2)
    options = (flip_sin_to_cos, downscale_frequency_shift, scale, max_period)
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (t, *layers))
    if not tracked and runs_triton(t, *layers):
        from .timestep_embedding_triton import launch

        return launch(t, channels, *layers, *options)
    return timestep_embedding_reference(t, channels, *layers, *options)


def timestep_embedding_reference(
    t: Tensor,
    channels: int,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    flip_sin_to_cos: bool,
    downscale_frequency_shift: float,
    scale: float,
    max_period: int,
) -> Tensor:
    """The same in plain torch; half precision is computed in float32."""
    wide = torch.promote_types(weight_1.dtype, torch.float32)
    waves = sinusoids(t, channels, flip_sin_to_cos, downscale_frequency_shift, scale, max_period)
    hidden = functional.silu(functional.linear(waves.to(wide), weight_1.to(wide), bias_1.to(wide)))
    return functional.linear(hidden, weight_2.to(wide), bias_2.to(wide)).to(weight_2.dtype)


def sinusoids(
    t: Tensor, channels: int, flip_sin_to_cos: bool, downscale_frequency_shift: float, scale: float, max_period: int
) -> Tensor:
    """(B, C) sines and cosines of `scale t / max_period^(j / (C / 2 - shift))`, in float32 at least."""
    half = channels // 2
    wide = torch.promote_types(t.dtype, torch.float32)
    exponent = -math.log(max_period) * torch.arange(half, dtype=wide, device=t.device)
    angle = scale * (t.to(wide)[:, None] * torch.exp(exponent / (half - downscale_frequency_shift)))
    waves = [angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()]
    return functional.pad(torch.cat(waves, dim=1), (0, channels % 2))
