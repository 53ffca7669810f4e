"""RMSNorm of queries and keys over the head's numbers, then their rotary embedding."""

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import runs_triton


def norm_rotary(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    epsilon: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding (RoFormer, arXiv 2104.09864, eq. 34) of `rms_norm(query) * query_weight`, and of the key's.

    Args:
        query: (B, N, H, D), with any strides: a view of a fused projection, say.
        key: likewise; its H may differ from the query's, and without a rotation its N too.
        query_weight: (D,), None for 1. `key_weight` likewise.
        key_weight: see `query_weight`.
        cos: (N, D), a constant; None for the norm alone, as `sin` then. D is even with a rotation.
        sin: (N, D), a constant.
        epsilon: added to the mean square.
        interleaved: numbers 2i and 2i + 1 turn together (`use_real_unbind_dim=-1` in diffusers), else i and D/2 + i
            (`-2`).

    Returns:
        Query and key, contiguous, in their own dtypes.
    """
    if runs_triton(query, key, query_weight, key_weight, cos, sin):
        from .rotary_triton import launch

        return launch(query, key, query_weight, key_weight, cos, sin, epsilon, interleaved)
    return norm_rotary_reference(query, key, query_weight, key_weight, cos, sin, epsilon, interleaved)


def norm_rotary_reference(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    epsilon: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch; half precision is computed in float32 and rounded once."""
    return (
        _norm_rotary(query, query_weight, cos, sin, epsilon, interleaved),
        _norm_rotary(key, key_weight, cos, sin, epsilon, interleaved),
    )


def _norm_rotary(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, epsilon: float, interleaved: bool
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = functional.rms_norm(x.to(wide), x.shape[-1:], eps=epsilon)
    if weight is not None:
        turned = turned * weight
    if cos is not None and sin is not None:
        turned = turned * cos[:, None] + _quarter_turn(turned, interleaved) * sin[:, None]
    return turned.to(x.dtype)


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    """`(-b, a)` of every pair `(a, b)`."""
    half = x.shape[-1] // 2
    dim, pairs = (-1, (half, 2)) if interleaved else (-2, (2, half))
    first, second = x.reshape(*x.shape[:-1], *pairs).unbind(dim)
    return torch.stack((-second, first), dim).flatten(-2)
