"""Triton source of the RMSNorm and rotary embedding of queries and keys; imported on CUDA only.

A program takes tokens with all their heads, so that a token's cosines and sines are read once. Query and key share a
launch: the first programs take the query's tokens, the others the key's.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from .compilation import Configuration

NUMBERS = 2048
"""In a program's registers at once: 16 a thread."""
PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors, for query and key each; one number for all GPUs, see `backward`."""


def launch(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    epsilon: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Query and key, differentiable in themselves and in the weights."""
    # Without a rotation nothing is paired; neighbours are read together.
    interleaved = interleaved or cos is None
    turned: tuple[Tensor, Tensor] = NormRotary.apply(  # type: ignore[no-untyped-call]
        query, key, query_weight, key_weight, cos, sin, epsilon, interleaved
    )
    return turned


class NormRotary(torch.autograd.Function):
    """Backward computes the mean squares again: they cost less than the memory they would take."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        epsilon: float,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        """One launch for query and key."""
        query, key = _readable(query), _readable(key)
        query_weight, key_weight, cos, sin = (
            None if value is None else value.contiguous() for value in (query_weight, key_weight, cos, sin)
        )
        turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
        tile = tile_of(query, key)
        programs = [triton.cdiv(x.shape[0] * x.shape[1], tile["TOKENS"]) if x.numel() else 0 for x in (query, key)]
        if sum(programs):
            # Triton launches on the current device, wherever the pointers lead.
            with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
                forward_kernel[(sum(programs),)](
                    *(query, query_weight, turned[0], *_layout(query)),
                    *(key, key_weight, turned[1], *_layout(key)),
                    *(cos, sin, query.shape[-1], epsilon, programs[0]),
                    INTERLEAVED=interleaved,
                    **tile,
                )
        ctx.save_for_backward(query, key, query_weight, key_weight, cos, sin)
        ctx.epsilon, ctx.interleaved = epsilon, interleaved
        return turned[0], turned[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
        """One launch; every program leaves its sums for the weights, and torch adds those up: no atomics."""
        query, key, query_weight, key_weight, cos, sin = ctx.saved_tensors
        d_query, d_key = _readable(d_query), _readable(d_key)
        tile = tile_of(query, key)
        inputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
        spans = [_span(x, tile["TOKENS"]) for x in (query, key)]
        programs = [
            triton.cdiv(x.shape[0] * x.shape[1], span) if x.numel() else 0
            for x, span in zip((query, key), spans, strict=True)
        ]
        sums = [
            query.new_empty((count, query.shape[-1]), dtype=torch.float32) if needed else None
            for count, needed in zip(programs, ctx.needs_input_grad[2:4], strict=True)
        ]
        if sum(programs):
            with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
                backward_kernel[(sum(programs),)](
                    *(
                        query,
                        query_weight,
                        d_query,
                        inputs[0],
                        sums[0],
                        *_layout(query),
                        *d_query.stride()[:3],
                        spans[0],
                    ),
                    *(key, key_weight, d_key, inputs[1], sums[1], *_layout(key), *d_key.stride()[:3], spans[1]),
                    *(cos, sin, query.shape[-1], ctx.epsilon, programs[0]),
                    INTERLEAVED=ctx.interleaved,
                    **tile,
                )
        d_weights = (None if partial is None else partial.sum(0) for partial in sums)
        return *inputs, *d_weights, None, None, None, None


def _readable(x: Tensor) -> Tensor:
    """With a head's numbers side by side, as the kernels read them; other strides are theirs to follow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _layout(x: Tensor) -> tuple[int, ...]:
    """Tokens, tokens of a sample, heads, and the strides of sample, token and head."""
    batch, length, heads, _ = x.shape
    return batch * length, length, heads, *x.stride()[:3]


def tile_of(query: Tensor, key: Tensor) -> dict[str, int]:
    """How many tokens and heads a program takes at once, fewer tokens where there would be too few programs."""
    half = triton.next_power_of_2(triton.cdiv(max(query.shape[-1], 1), 2))
    heads = min(triton.next_power_of_2(max(query.shape[2], key.shape[2], 1)), max(1, NUMBERS // (2 * half)))
    tokens = max(1, NUMBERS // (2 * half * heads))
    while tokens > 1 and query.shape[0] * query.shape[1] < PROGRAMS * tokens:
        tokens //= 2
    return {"TOKENS": tokens, "HEADS": heads, "HALF": half}


def _span(x: Tensor, tokens: int) -> int:
    """Tokens that a program of `backward` goes through, for about `PROGRAMS` programs."""
    turns: int = triton.cdiv(x.shape[0] * x.shape[1], PROGRAMS * tokens)
    return tokens * max(1, turns)


@triton.jit  # type: ignore[untyped-decorator]
def _load_pairs(pointer, offset, inside, columns, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers that turn together, as two (tokens, heads, HALF) tiles of float32."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, None, :]
        both = tl.load(pointer + offset + column, mask=inside & (column < columns), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], both.shape[1], HALF, 2]))
    else:
        column = tl.arange(0, HALF)[None, None, :]
        within = inside & (column < columns // 2)
        first = tl.load(pointer + offset + column, mask=within, other=0.0).to(tl.float32)
        second = tl.load(pointer + offset + columns // 2 + column, mask=within, other=0.0).to(tl.float32)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def _store_pairs(pointer, offset, first, second, inside, columns, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `_load_pairs` would load."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], first.shape[1], 2 * HALF])
        tl.store(pointer + offset + column, both.to(pointer.dtype.element_ty), mask=inside & (column < columns))
    else:
        column = tl.arange(0, HALF)[None, None, :]
        within = inside & (column < columns // 2)
        tl.store(pointer + offset + column, first.to(pointer.dtype.element_ty), mask=within)
        tl.store(pointer + offset + columns // 2 + column, second.to(pointer.dtype.element_ty), mask=within)


@triton.jit  # type: ignore[untyped-decorator]
def _load_weight(pointer, columns, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(1, 1, HALF) twice; 1 where there is no weight."""
    if pointer is not None:
        here = tl.zeros([1, 1, 1], tl.int32)
        first, second = _load_pairs(pointer, here, here == 0, columns, HALF, INTERLEAVED)
    else:
        first, second = tl.full([1, 1, HALF], 1.0, tl.float32), tl.full([1, 1, HALF], 1.0, tl.float32)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    start, x_pointer, weight_pointer, turned_pointer, tokens, length, heads, batch_stride, token_stride, head_stride,
    cos_pointer, sin_pointer, columns, epsilon,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Of the query or the key: `TOKENS` tokens, `HEADS` heads at a time."""
    # Tokens are counted in 32 bits, which divide faster; addresses in 64.
    token = start + tl.arange(0, TOKENS)[:, None, None]
    batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    weight_first, weight_second = _load_weight(weight_pointer, columns, HALF, INTERLEAVED)
    if cos_pointer is not None:
        cos_first, cos_second = _load_pairs(cos_pointer, place * columns, token < tokens, columns, HALF, INTERLEAVED)
        sin_first, sin_second = _load_pairs(sin_pointer, place * columns, token < tokens, columns, HALF, INTERLEAVED)
    for first_head in range(0, heads, HEADS):
        head = first_head + tl.arange(0, HEADS)[None, :, None]
        inside = (token < tokens) & (head < heads)
        offset = batch * batch_stride + place * token_stride + head.to(tl.int64) * head_stride
        first, second = _load_pairs(x_pointer, offset, inside, columns, HALF, INTERLEAVED)
        square = tl.sum(first * first + second * second, axis=2, keep_dims=True) / columns
        inverse = tl.rsqrt(square + epsilon)
        first *= inverse * weight_first
        second *= inverse * weight_second
        if cos_pointer is not None:
            old_first = first
            first = first * cos_first - second * sin_first
            second = second * cos_second + old_first * sin_second
        offset = (token.to(tl.int64) * heads + head) * columns
        _store_pairs(turned_pointer, offset, first, second, inside, columns, HALF, INTERLEAVED)


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    query_pointer, query_weight_pointer, turned_query_pointer,
    query_tokens, query_length, query_heads, query_batch_stride, query_token_stride, query_head_stride,
    key_pointer, key_weight_pointer, turned_key_pointer,
    key_tokens, key_length, key_heads, key_batch_stride, key_token_stride, key_head_stride,
    cos_pointer, sin_pointer, columns, epsilon, query_programs,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first `query_programs` take the query, the others the key."""
    program = tl.program_id(0)
    if program < query_programs:
        _forward(
            program * TOKENS, query_pointer, query_weight_pointer, turned_query_pointer,
            query_tokens, query_length, query_heads, query_batch_stride, query_token_stride, query_head_stride,
            cos_pointer, sin_pointer, columns, epsilon, INTERLEAVED, TOKENS, HEADS, HALF,
        )  # fmt: skip
    else:
        _forward(
            (program - query_programs) * TOKENS, key_pointer, key_weight_pointer, turned_key_pointer,
            key_tokens, key_length, key_heads, key_batch_stride, key_token_stride, key_head_stride,
            cos_pointer, sin_pointer, columns, epsilon, INTERLEAVED, TOKENS, HEADS, HALF,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    program, x_pointer, weight_pointer, d_turned_pointer, d_x_pointer, d_weight_pointer,
    tokens, length, heads, batch_stride, token_stride, head_stride,
    d_batch_stride, d_token_stride, d_head_stride, span, cos_pointer, sin_pointer, columns, epsilon,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Of the query or the key: `span` tokens, whose sums for the weight stay in registers to the end."""
    weight_first, weight_second = _load_weight(weight_pointer, columns, HALF, INTERLEAVED)
    sum_first = tl.zeros([TOKENS, HEADS, HALF], tl.float32)
    sum_second = tl.zeros([TOKENS, HEADS, HALF], tl.float32)
    for start in range(program * span, tl.minimum((program + 1) * span, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)[:, None, None]
        batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
        for first_head in range(0, heads, HEADS):
            head = first_head + tl.arange(0, HEADS)[None, :, None]
            inside = (token < tokens) & (head < heads)
            offset = batch * d_batch_stride + place * d_token_stride + head.to(tl.int64) * d_head_stride
            d_first, d_second = _load_pairs(d_turned_pointer, offset, inside, columns, HALF, INTERLEAVED)
            if cos_pointer is not None:
                here = place * columns
                cos_first, cos_second = _load_pairs(cos_pointer, here, token < tokens, columns, HALF, INTERLEAVED)
                sin_first, sin_second = _load_pairs(sin_pointer, here, token < tokens, columns, HALF, INTERLEAVED)
                old_first = d_first
                d_first = d_first * cos_first + d_second * sin_second
                d_second = d_second * cos_second - old_first * sin_first
            offset = batch * batch_stride + place * token_stride + head.to(tl.int64) * head_stride
            first, second = _load_pairs(x_pointer, offset, inside, columns, HALF, INTERLEAVED)
            square = tl.sum(first * first + second * second, axis=2, keep_dims=True) / columns
            inverse = tl.rsqrt(square + epsilon)
            first *= inverse
            second *= inverse
            sum_first += d_first * first
            sum_second += d_second * second
            d_first *= weight_first
            d_second *= weight_second
            mean = tl.sum(d_first * first + d_second * second, axis=2, keep_dims=True) / columns
            d_first = (d_first - first * mean) * inverse
            d_second = (d_second - second * mean) * inverse
            offset = (token.to(tl.int64) * heads + head) * columns
            _store_pairs(d_x_pointer, offset, d_first, d_second, inside, columns, HALF, INTERLEAVED)
    if d_weight_pointer is not None:
        first = tl.sum(tl.sum(sum_first, axis=0), axis=0)[None, None, :]
        second = tl.sum(tl.sum(sum_second, axis=0), axis=0)[None, None, :]
        offset = tl.zeros([1, 1, 1], tl.int64) + program.to(tl.int64) * columns
        _store_pairs(d_weight_pointer, offset, first, second, offset >= 0, columns, HALF, INTERLEAVED)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    query_pointer, query_weight_pointer, d_turned_query_pointer, d_query_pointer, d_query_weight_pointer,
    query_tokens, query_length, query_heads, query_batch_stride, query_token_stride, query_head_stride,
    d_query_batch_stride, d_query_token_stride, d_query_head_stride, query_span,
    key_pointer, key_weight_pointer, d_turned_key_pointer, d_key_pointer, d_key_weight_pointer,
    key_tokens, key_length, key_heads, key_batch_stride, key_token_stride, key_head_stride,
    d_key_batch_stride, d_key_token_stride, d_key_head_stride, key_span,
    cos_pointer, sin_pointer, columns, epsilon, query_programs,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first `query_programs` take the query, the others the key."""
    program = tl.program_id(0)
    if program < query_programs:
        _backward(
            program, query_pointer, query_weight_pointer, d_turned_query_pointer, d_query_pointer,
            d_query_weight_pointer, query_tokens, query_length, query_heads,
            query_batch_stride, query_token_stride, query_head_stride,
            d_query_batch_stride, d_query_token_stride, d_query_head_stride, query_span,
            cos_pointer, sin_pointer, columns, epsilon, INTERLEAVED, TOKENS, HEADS, HALF,
        )  # fmt: skip
    else:
        _backward(
            program - query_programs, key_pointer, key_weight_pointer, d_turned_key_pointer, d_key_pointer,
            d_key_weight_pointer, key_tokens, key_length, key_heads,
            key_batch_stride, key_token_stride, key_head_stride,
            d_key_batch_stride, d_key_token_stride, d_key_head_stride, key_span,
            cos_pointer, sin_pointer, columns, epsilon, INTERLEAVED, TOKENS, HEADS, HALF,
        )  # fmt: skip


def configurations(dtype: str) -> list[Configuration]:
    """SD3's heads of 64 in pairs side by side, and of 128 in halves; odd sizes too; `fp32`, `fp16` or `bf16`."""
    found = []
    for interleaved, head in ((True, 64), (False, 128)):
        x = torch.empty(1, 4096, 24, head, device="meta")
        constants = {"INTERLEAVED": interleaved, **tile_of(x, x)}
        # Constants stand for what a launch sees: that 16 divides the numbers.
        sizes = {
            "columns": head,
            **dict(zip(("batch_stride", "token_stride", "head_stride"), x.stride(), strict=False)),
        }
        for kernel in (forward_kernel, backward_kernel):
            usual = {name: size for name in kernel.arg_names for kind, size in sizes.items() if name.endswith(kind)}
            for name, known in (("", usual), ("-odd", {})):
                fixed = constants | known
                types = {parameter: _type(parameter, dtype) for parameter in kernel.arg_names if parameter not in fixed}
                found.append(Configuration(f"{kernel.__name__}-{head}{name}", kernel, types, fixed))
    return found


def _type(parameter: str, dtype: str) -> str:
    """Angles and sums are float32; sizes and strides are 32-bit integers."""
    if parameter in ("cos_pointer", "sin_pointer", "d_query_weight_pointer", "d_key_weight_pointer"):
        return "*fp32"
    if parameter.endswith("_pointer"):
        return f"*{dtype}"
    return "fp32" if parameter == "epsilon" else "i32"
