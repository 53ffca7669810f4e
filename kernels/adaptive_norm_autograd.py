"""How torch calls the kernels of `adaptive_norm_triton.py` and differentiates them; imported on CUDA only."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adaptive_norm_triton import (
    WALK,
    backward_kernel,
    backward_tile,
    forward_kernel,
    forward_tile,
    row_means,
    row_statistics,
)


def launch(
    residual: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    kind: str | None = None,
) -> tuple[Any, Any]:
    """The stream, None without a branch, and its norm, None without a kind; differentiable in every tensor."""
    if branch is not None and kind is not None and not forward_tile(*residual.shape)["WHOLE"]:
        stream, _ = launch(residual, branch, gate)  # the norm's sums need the whole row first
        return stream, launch(stream, None, None, scale, shift, weight, bias, epsilon, kind)[1]
    (gate,) = _views(residual, gate)
    scale, shift = _views(residual, scale, shift)
    both: tuple[Any, Any] = GatedResidualNorm.apply(  # type: ignore[no-untyped-call]
        residual, branch, gate, scale, shift, weight, bias, epsilon, kind
    )
    return both


def _views(x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors as (B, 1, D), or all as (B, N, D) if one of them is."""
    present = [vector.unsqueeze(1) if vector is not None and vector.ndim == 2 else vector for vector in vectors]
    rows = x.shape[1] if any(vector is not None and vector.shape[1] != 1 for vector in present) else 1
    return [None if vector is None else vector.expand(len(x), rows, -1) for vector in present]


class GatedResidualNorm(torch.autograd.Function):
    """`stream, normed` of residual and branch (B, N, D), with vectors (B, 1, D) or (B, N, D); no gate is one of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        epsilon: float,
        kind: str | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One pass over memory; each row's mean and inverse deviation are kept for backward."""
        residual = residual.contiguous()
        branch, weight, bias = _contiguous(branch, weight, bias)
        batch, rows, columns = residual.shape
        stream = None if branch is None else torch.empty_like(residual)
        normed = None if kind is None else torch.empty_like(residual)
        statistics = None if kind is None else residual.new_empty((batch, rows, 2), dtype=torch.float32)
        flags = {"GATE_BY_ROW": _is_by_row(gate), "BY_ROW": _is_by_row(scale, shift), "KIND": kind}
        tile = forward_tile(batch, rows, columns)
        if residual.numel():
            # Triton launches on the current device, wherever the pointers lead.
            with torch.cuda.device_of(residual):  # type: ignore[no-untyped-call]
                if kind is not None and not tile["WHOLE"]:
                    row_statistics[(batch * rows,)](residual, statistics, epsilon, KIND=kind, COLUMNS=columns, **WALK)
                blocks = triton.cdiv(rows, tile["ROWS"])
                forward_kernel[(batch * blocks, triton.cdiv(columns, tile["BLOCK"]))](
                    *(residual, branch, *_strided(gate), *_strided(scale), *_strided(shift), weight, bias),
                    *(stream, normed, statistics, rows, blocks, epsilon),
                    **flags,
                    **tile,
                )
        ctx.set_materialize_grads(False)
        # The residual alone needs none of its numbers, only their shape; the branch is for the gate's gradient.
        x = branch if kind is None else residual if stream is None else stream
        ctx.save_for_backward(x, None if gate is None else branch, gate, scale, weight, bias, statistics)
        ctx.flags = flags
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        """One pass over memory; every program leaves sums over its rows, and torch adds those up: no atomics."""
        _, _, gate, scale, weight, bias, _ = ctx.saved_tensors
        d_stream, d_normed = _contiguous(d_stream, d_normed)
        by_row, gate_by_row = ctx.flags["BY_ROW"], ctx.flags["GATE_BY_ROW"]
        written = _run_backward(ctx, d_stream, d_normed)
        d_residual = d_stream if d_normed is None else written.get("d_x")
        d_branch = d_residual if gate is None else written.get("d_branch")
        d_gate = written.get("d_gate")
        if d_gate is not None and not gate_by_row:
            d_gate = d_gate.sum(1, keepdim=True)
        modulation = None if by_row else scale
        products, totals = written.get("products"), written.get("totals")
        d_scale, d_shift, d_weight, d_bias = _of_vectors(products, totals, modulation, weight, bias)
        if by_row:
            d_scale, d_shift = written.get("d_scale"), d_normed
        found = (d_residual, d_branch, d_gate, d_scale, d_shift, d_weight, d_bias, None, None)
        return tuple(value if needed else None for value, needed in zip(found, ctx.needs_input_grad, strict=True))


def _run_backward(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None) -> dict[str, Tensor]:
    """What the kernel writes, by name."""
    x, branch, gate, scale, weight, bias, statistics = ctx.saved_tensors
    tile, span = backward_tile(*x.shape)
    blocks = triton.cdiv(x.shape[1], span)
    written = _written(ctx, x, blocks, gate is not None, bias is not None, d_normed is not None)
    if not written or not x.numel():
        return written
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        means = None
        if d_normed is not None and not tile["WHOLE"]:
            means = torch.empty_like(statistics)
            row_means[(len(x) * x.shape[1],)](
                *(d_normed, x, *_strided(scale), weight, statistics, means, x.shape[1]), COLUMNS=x.shape[2], **WALK
            )
        names = ("d_x", "d_branch", "d_gate", "d_scale", "products", "totals")
        backward_kernel[(len(x) * blocks, triton.cdiv(x.shape[2], tile["BLOCK"]))](
            *(d_stream, d_normed, x, branch, *_strided(gate), *_strided(scale), weight, bias, statistics, means),
            *(*(written.get(name) for name in names), x.shape[1], blocks, span),
            **ctx.flags,
            **tile,
        )
    return written


def _written(ctx: Any, x: Tensor, blocks: int, has_gate: bool, has_bias: bool, has_normed: bool) -> dict[str, Tensor]:
    """Memory for gradients as large as x, and for each program's sums over its rows, as far as they are needed."""
    of_residual, of_branch, of_gate, *of_norm = ctx.needs_input_grad[:7]
    of_scale, of_shift, of_weight, of_bias = (needed and has_normed for needed in of_norm)
    by_row, gate_by_row = ctx.flags["BY_ROW"], ctx.flags["GATE_BY_ROW"]
    large = {
        "d_x": has_normed and (of_residual or (of_branch and not has_gate)),
        "d_branch": of_branch and has_gate,
        "d_gate": of_gate and gate_by_row,
        "d_scale": of_scale and by_row,
    }
    summed = {
        "d_gate": of_gate and not gate_by_row,
        "products": of_weight or (of_scale and not by_row),
        "totals": of_bias or (not by_row and (of_shift or (of_scale and has_bias))),
    }
    sums = x.shape[0], blocks, x.shape[2]
    return {name: torch.empty_like(x) for name, needed in large.items() if needed} | {
        name: x.new_empty(sums, dtype=torch.float32) for name, needed in summed.items() if needed
    }


def _of_vectors(
    products: Tensor | None, totals: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the sample's scale and shift and of weight and bias, as far as the programs' sums lead to them."""
    d_scale = d_shift = d_weight = d_bias = None
    factor = 1.0 if scale is None else 1.0 + scale.float()
    if products is not None:
        products = products.sum(1, keepdim=True)
        d_scale = products if weight is None else products * weight
        d_weight = None if weight is None else (products * factor).sum((0, 1))
    if totals is not None:
        d_shift = totals.sum(1, keepdim=True)
        d_bias = None if bias is None else (d_shift * factor).sum((0, 1))
        d_scale = d_scale if d_scale is None or bias is None else d_scale + d_shift * bias
    return d_scale, d_shift, d_weight, d_bias


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _strided(vector: Tensor | None) -> tuple[Tensor | None, int, int]:
    """What a kernel reads a vector by: itself, its strides from sample to sample and from row to row."""
    if vector is None:
        return None, 0, 0
    if vector.stride(-1) != 1:
        vector = vector.contiguous()
    return vector, vector.stride(0), vector.stride(1) if _is_by_row(vector) else 0


def _is_by_row(*vectors: Tensor | None) -> bool:
    return any(vector is not None and vector.shape[1] != 1 for vector in vectors)
