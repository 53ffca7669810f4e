"""Gated linear units (arXiv 2002.05202): in transformers' feed-forward networks and Sana's GLUMBConv."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import runs_triton

Activation = Literal["gelu", "gelu_tanh", "silu"]


def gated_linear_unit(x: Tensor, activation: Activation = "gelu", dim: int = -1) -> Tensor:
    """`value * activation(gate)` of `value, gate = x.chunk(2, dim)`: GEGLU or SwiGLU (arXiv 2002.05202, eq. 6).

    Args:
        x: any shape and layout, of even size along `dim`; (B, N, 2 D) or, with `dim=1`, (B, 2 C, H, W) say.
        activation: `gelu` with the error function, `gelu_tanh` its approximation, or `silu`.
        dim: that holds the value's half, then the gate's.

    Returns:
        Half as many along `dim`, in the dtype of `x`, and in its layout where `x` is dense.

    Raises:
        ValueError: the size along `dim` is odd.
    """
    if x.shape[dim] % 2:
        raise ValueError(f"a gated linear unit halves dimension {dim}: its size must be even, not {x.shape[dim]}")
    if runs_triton(x) and x.numel():
        from .gated_linear_unit_triton import launch

        return launch(x, activation, dim)
    return gated_linear_unit_reference(x, activation, dim)


def gated_linear_unit_reference(x: Tensor, activation: Activation = "gelu", dim: int = -1) -> Tensor:
    """The same in plain torch; half precision is computed in float32 and rounded once."""
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim)
    if activation == "silu":
        return (value * functional.silu(gate)).to(x.dtype)
    return (value * functional.gelu(gate, approximate="none" if activation == "gelu" else "tanh")).to(x.dtype)
