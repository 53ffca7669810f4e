"""Attention, and its derivative along a direction: what consistency models and MeanFlow train with."""

from functools import partial

import torch
from torch import Tensor

from .dispatch import runs_triton

WIDEST_HEAD = 128
"""Head dimensions beyond it do not fit the kernels' registers."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`softmax(scale Q K^T) V` in memory linear in the lengths; also under `torch.func.jvp` and `forward_ad`.

    The kernel needs a head dimension D that is a multiple of 8, up to 128; the reference does the others. It is
    differentiated once: backward (through the output, not through its tangent), or forward.

    Args:
        query: (B, H, N, D), any strides; rows that lie contiguous, 16-byte aligned, are not copied.
        key: (B, H, M, D) of the same dtype.
        value: (B, H, M, D) of the same dtype.
        causal: query i sees the keys up to i, whatever N and M, as in torch.
        scale: of the scores; by default `1 / sqrt(D)`.
        lengths: (B,) int32, how many of its keys a sample has; the others are never read. A query without keys gets 0.

    Returns:
        (B, H, N, D) in the inputs' dtype.

    Raises:
        ValueError: if shapes or dtypes do not match.
    """
    _check(query, key, value, (), lengths)
    if _fits_kernel(query, key, value, lengths):
        from .attention_autograd import attend

        return attend(query, key, value, causal, scale, lengths)
    return attention_reference(query, key, value, causal, scale, lengths)


def attention_with_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_query: Tensor | None = None,
    d_key: Tensor | None = None,
    d_value: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its derivative along the tangents of its inputs, in one pass (arXiv 2410.11081, appendix).

    With `P = softmax(S)` and `dS = scale (dQ K^T + Q dK^T)`: `dO = (P o dS) V - rowsum(P o dS) O + P dV`.

    Args:
        query: see `attention`, as for what follows the tangents.
        key: the same.
        value: the same.
        d_query: tangent in the shape and dtype of `query`; None is zero and costs nothing.
        d_key: of `key`.
        d_value: of `value`.
        causal: see `attention`.
        scale: the same.
        lengths: the same.

    Returns:
        Output and tangent, both (B, H, N, D). Gradients flow through the output; the kernel's tangent has none, and
        raises NotImplementedError if one is asked for: detach it.

    Raises:
        ValueError: if shapes or dtypes do not match.
    """
    _check(query, key, value, (d_query, d_key, d_value), lengths)
    if _fits_kernel(query, key, value, d_query, d_key, d_value, lengths):
        from .attention_autograd import attend_with_tangent

        return attend_with_tangent(query, key, value, d_query, d_key, d_value, causal, scale, lengths)
    return attention_with_tangent_reference(query, key, value, d_query, d_key, d_value, causal, scale, lengths)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The same as `attention` in plain torch, differentiable any number of times; halves are computed in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, keys = query.shape[2], key.shape[2]
    hidden = torch.zeros(1, 1, 1, keys, dtype=torch.bool, device=query.device)
    if lengths is not None:
        hidden = (torch.arange(keys, device=query.device) >= lengths[:, None])[:, None, None]
        # Rows of zeros, so that nothing in them counts, and a query without keys averages zeros.
        key, value = (tensor.masked_fill(hidden.mT, 0) for tensor in (key, value))
    if causal:
        hidden = hidden | torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(1)
    scores = query.to(wide) @ key.to(wide).mT * (query.shape[3] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(hidden, torch.finfo(wide).min).softmax(-1)
    return (weights @ value.to(wide)).to(query.dtype)


def attention_with_tangent_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_query: Tensor | None = None,
    d_key: Tensor | None = None,
    d_value: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `attention_with_tangent` by torch's forward-mode differentiation of `attention_reference`."""
    primals, tangents = (query, key, value), (d_query, d_key, d_value)
    directions = tuple(
        torch.zeros_like(primal) if tangent is None else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    )
    function = partial(attention_reference, causal=causal, scale=scale, lengths=lengths)
    found = torch.func.jvp(function, primals, directions)
    return found[0], found[1]


def _fits_kernel(*tensors: Tensor | None) -> bool:
    head = 0 if tensors[0] is None else tensors[0].shape[3]
    return runs_triton(*tensors) and head % 8 == 0 and 0 < head <= WIDEST_HEAD


def _check(
    query: Tensor, key: Tensor, value: Tensor, tangents: tuple[Tensor | None, ...], lengths: Tensor | None
) -> None:
    """Raise for what would have a kernel read beyond a tensor's end, or as another type."""
    batch, heads, _, head = query.shape if query.ndim == 4 else (-1,) * 4
    if key.ndim != 4 or key.shape != value.shape or (*key.shape[:2], key.shape[3]) != (batch, heads, head):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"attention takes a query (B, H, N, D) and key and value (B, H, M, D), not {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value are of one dtype, not {query.dtype}, {key.dtype} and {value.dtype}")
    for primal, tangent in zip((query, key, value), tangents, strict=False):
        if tangent is not None and (tangent.shape != primal.shape or tangent.dtype != primal.dtype):
            raise ValueError("a tangent has the shape and dtype of what it is a tangent of")
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != torch.int32):
        raise ValueError(
            f"lengths are ({batch},) int32, one of each sample, not {tuple(lengths.shape)} {lengths.dtype}"
        )
