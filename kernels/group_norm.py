"""Group normalisation, a time embedding's scale and shift, and SiLU: what precedes a UNet's or VAE's convolutions."""

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import runs_triton


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """`silu(group_norm(x) * (1 + scale) + shift)` (arXiv 1803.08494, eq. 1; scale and shift: 2105.05233, eq. 4).

    Args:
        x: (B, C, ...), contiguous or with channels last in memory; others are made contiguous.
        groups: of C / groups channels, that share mean and variance.
        weight: (C,), None for 1.
        bias: (C,), None for 0.
        epsilon: added to the variance.
        scale: (B, C), None for 0. `shift` likewise.
        shift: see `scale`.
        activation: False leaves the SiLU out.

    Returns:
        (B, C, ...) in the dtype of `x`, contiguous or channels_last as `x` is.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels do not make {groups} groups: the groups must divide the channels")
    if runs_triton(x, weight, bias, scale, shift) and x.numel():
        from .group_norm_triton import launch

        return launch(x, groups, weight, bias, epsilon, scale, shift, activation)
    return group_norm_silu_reference(x, groups, weight, bias, epsilon, scale, shift, activation)


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """The same in plain torch; half precision is computed in float32 and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias, scale, shift = (None if value is None else value.to(wide) for value in (weight, bias, scale, shift))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # without one, torch's backward fails on a CPU
    normed = functional.group_norm(x.to(wide), groups, weight, bias, epsilon)
    per_sample = (x.shape[0], x.shape[1], *(1 for _ in x.shape[2:]))
    if scale is not None:
        normed = normed * (1 + scale.reshape(per_sample))
    if shift is not None:
        normed = normed + shift.reshape(per_sample)
    return (functional.silu(normed) if activation else normed).to(x.dtype)
