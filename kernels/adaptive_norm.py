"""Normalisation with adaptive modulation and the gated residual before it: how a transformer's blocks take the time."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import runs_triton

Kind = Literal["layer", "rms"]


def adaptive_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-6,
    kind: Kind = "layer",
) -> Tensor:
    """`(1 + scale) * (norm(x) * weight + bias) + shift`: adaLN of DiT (arXiv 2212.09748, section 3.2).

    Args:
        x: (B, N, D); the norm is over D.
        scale: (B, D), (B, 1, D) or (B, N, D), with any strides; None for 0. `shift` likewise.
        shift: see `scale`.
        weight: (D,), None for 1.
        bias: (D,), None for 0.
        epsilon: added to the variance (`layer`) or to the mean square (`rms`).
        kind: `layer` subtracts the mean, `rms` does not.

    Returns:
        (B, N, D) in the dtype of `x`.

    Raises:
        ValueError: another kind.
    """
    _check(kind)
    if runs_triton(x, scale, shift, weight, bias):
        from .adaptive_norm_autograd import launch

        normed: Tensor = launch(x, None, None, scale, shift, weight, bias, epsilon, kind)[1]
        return normed
    return adaptive_norm_reference(x, scale, shift, weight, bias, epsilon, kind)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`residual + gate * branch`: the end of a block's attention or feed-forward network.

    Args:
        residual: (B, N, D).
        branch: (B, N, D).
        gate: (B, D), (B, 1, D) or (B, N, D), with any strides.

    Returns:
        (B, N, D) in the dtype of `residual`.
    """
    if runs_triton(residual, branch, gate):
        from .adaptive_norm_autograd import launch

        stream: Tensor = launch(residual, branch, gate)[0]
        return stream
    return gated_residual_reference(residual, branch, gate)


def gated_residual_norm(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-6,
    kind: Kind = "layer",
) -> tuple[Tensor, Tensor]:
    """`stream = gated_residual(residual, branch, gate)` and `adaptive_norm(stream, ...)` in one pass over memory.

    The arguments are those of the two functions; without a gate, the stream is the plain sum.

    Returns:
        Stream and normed, (B, N, D) each, in the dtype of `residual`.

    Raises:
        ValueError: another kind.
    """
    _check(kind)
    if runs_triton(residual, branch, gate, scale, shift, weight, bias):
        from .adaptive_norm_autograd import launch

        return launch(residual, branch, gate, scale, shift, weight, bias, epsilon, kind)
    return gated_residual_norm_reference(residual, branch, gate, scale, shift, weight, bias, epsilon, kind)


def adaptive_norm_reference(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-6,
    kind: Kind = "layer",
) -> Tensor:
    """The same in plain torch; half precision is computed in float32 and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = functional.layer_norm if kind == "layer" else functional.rms_norm
    normed = norm(x.to(wide), x.shape[-1:], eps=epsilon)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    if scale is not None:
        normed = normed * (1 + _by_row(scale.to(wide)))
    if shift is not None:
        normed = normed + _by_row(shift)
    return normed.to(x.dtype)


def gated_residual_reference(residual: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    """The same in plain torch; half precision is computed in float32 and rounded once."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    gated = branch if gate is None else _by_row(gate.to(wide)) * branch
    return (residual.to(wide) + gated).to(residual.dtype)


def gated_residual_norm_reference(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-6,
    kind: Kind = "layer",
) -> tuple[Tensor, Tensor]:
    """One reference after the other: the norm is of the stream as it is stored, rounded to its dtype."""
    stream = gated_residual_reference(residual, branch, gate)
    return stream, adaptive_norm_reference(stream, scale, shift, weight, bias, epsilon, kind)


def _by_row(vector: Tensor) -> Tensor:
    """(B, D) as (B, 1, D), which meets every row; (B, 1, D) and (B, N, D) as they are."""
    return vector.unsqueeze(1) if vector.ndim == 2 else vector


def _check(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"the kind of a norm is one of {', '.join(get_args(Kind))}, not {kind}")
