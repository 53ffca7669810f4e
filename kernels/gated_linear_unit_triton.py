"""Triton source of gated linear units; imported on CUDA only.

In memory a dense tensor is rows of a value's half and a gate's half, whichever dimension is halved: (B, N, 2 D) is B N
rows of halves of D, (B, 2 C, H, W) is B rows of halves of C H W, or B H W rows of halves of C if it is channels_last.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from .compilation import Configuration
from .gated_linear_unit import Activation

BLOCK = 2048
"""Results of a program: of each thread 16, which are four loads of 16 bytes in half precision."""
COLUMNS = 256
"""Of a block of several rows: 512 bytes in half precision, and a divisor of the networks' usual widths."""


def launch(x: Tensor, activation: Activation = "gelu", dim: int = -1) -> Tensor:
    """Unit of a tensor that has elements; differentiable once."""
    dim %= x.ndim
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    if not x.permute(order).is_contiguous():
        order = list(range(x.ndim))
    gated: Tensor = GatedLinearUnit.apply(x.permute(order), activation, order.index(dim))  # type: ignore[no-untyped-call]
    return gated.permute([order.index(axis) for axis in range(x.ndim)])


class GatedLinearUnit(torch.autograd.Function):
    """One pass each way: backward computes the activation again from the input, which is all that is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, dim: int) -> Tensor:
        """Of dimensions in the order of memory."""
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.activation, ctx.dim = activation, dim
        shape = list(x.shape)
        shape[dim] //= 2
        result = x.new_empty(shape)
        _run(forward_kernel, (x, result), dim, activation)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Both halves' gradient."""
        (x,) = ctx.saved_tensors
        x_gradient = torch.empty_like(x)
        _run(backward_kernel, (x, gradient.contiguous(), x_gradient), ctx.dim, ctx.activation)
        return x_gradient, None, None


def _run(kernel: Any, tensors: tuple[Tensor, ...], dim: int, activation: Activation) -> None:
    half = tensors[0].shape[dim:].numel() // 2
    rows = tensors[0].shape[:dim].numel()
    columns = min(triton.next_power_of_2(half), max(COLUMNS, BLOCK // triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, BLOCK // columns) * triton.cdiv(half, columns)
    # Triton launches on the current device, wherever the pointers lead.
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[(blocks,)](*tensors, rows, half, ACTIVATION=activation, ROWS=BLOCK // columns, COLUMNS=columns)


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    result_pointer,
    rows,
    half,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of results, in float32."""
    row, column, mask = place(rows, half, ROWS, COLUMNS)
    value = tl.load(x_pointer + 2 * row * half + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_pointer + (2 * row + 1) * half + column, mask=mask, other=0.0).to(tl.float32)
    share, _ = activate(gate, ACTIVATION)
    tl.store(result_pointer + row * half + column, value * gate * share, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    gradient_pointer,
    x_gradient_pointer,
    rows,
    half,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The input's gradient at a block of results."""
    row, column, mask = place(rows, half, ROWS, COLUMNS)
    value_offset = 2 * row * half + column
    value = tl.load(x_pointer + value_offset, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_pointer + value_offset + half, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_pointer + row * half + column, mask=mask, other=0.0).to(tl.float32)
    share, slope = activate(gate, ACTIVATION)
    tl.store(x_gradient_pointer + value_offset, gradient * gate * share, mask=mask)
    tl.store(x_gradient_pointer + value_offset + half, gradient * value * (share + gate * slope), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def place(rows, half, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows, columns and mask of this program's block; rows in int64, as their offsets may need it."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(half, COLUMNS)
    row = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < half)


@triton.jit  # type: ignore[untyped-decorator]
def activate(gate, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The share of the gate that passes, `activation(gate) / gate`, and its derivative."""
    if ACTIVATION == "gelu":
        # Normal distribution function within 1e-7 (Abramowitz and Stegun, 7.1.26). tl.erf takes so many instructions
        # that memory would wait for them in half precision; and the exponential is the derivative's too.
        density = tl.exp(-0.5 * gate * gate)
        t = 1.0 / (1.0 + 0.23164188864 * tl.abs(gate))
        polynomial = ((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736
        tail = 0.5 * density * t * (polynomial * t + 0.254829592)
        share = tl.where(gate < 0, tail, 1.0 - tail)
        slope = 0.3989422804014327 * density
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        square = gate * gate
        share = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
        slope = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        share = tl.sigmoid(gate)
        slope = share * (1.0 - share)
    return share, slope


def configurations(dtype: str) -> list[Configuration]:
    """How the kernels are compiled for tensors of a dtype that Triton calls `fp32`, `fp16` or `bf16`."""
    sizes = {"rows": "i32", "half": "i32"}
    ways = (
        ("forward", forward_kernel, ("x_pointer", "result_pointer")),
        ("backward", backward_kernel, ("x_pointer", "gradient_pointer", "x_gradient_pointer")),
    )
    return [
        Configuration(
            f"{name}-{activation}",
            kernel,
            dict.fromkeys(pointers, f"*{dtype}") | sizes,
            {"ACTIVATION": activation, "ROWS": BLOCK // COLUMNS, "COLUMNS": COLUMNS},
        )
        for name, kernel, pointers in ways
        for activation in ("gelu", "gelu_tanh")  # silu is gelu_tanh with less to compute
    ]
