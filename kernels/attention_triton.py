"""Triton source of attention and its forward-mode derivative; imported on CUDA only.

Scores are kept in base 2, exp(x) = 2^(x log2 e), which is what the hardware computes.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from .attention_tiles import (
    LOG2_E,
    Tile,
    configuration,
    empty,
    load_rows,
    place_of,
    product,
    run,
    seen_keys,
    store_rows,
    visible_keys,
)
from .compilation import Configuration


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_query: Tensor | None,
    d_key: Tensor | None,
    d_value: Tensor | None,
    causal: bool,
    scale: float | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One program per tile of queries: it reads every key that they see once."""
    with_tangent = any(tangent is not None for tangent in (d_query, d_key, d_value))
    out, d_out = empty(query), empty(query) if with_tangent else None
    log_sum = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    matrices = query, key, value, d_query, d_key, d_value, out, d_out
    tile = tile_of(query.dtype != torch.float32, query.shape[3], with_tangent)
    run(forward_kernel, tile, triton.cdiv(query.shape[2], tile.rows), matrices, (log_sum, lengths), causal, scale)
    return out, d_out, log_sum


def tile_of(half: bool, head: int, with_tangent: bool) -> Tile:
    """The largest tile found that no supported GPU lacks registers (255 a thread) or shared memory (99 KiB) for."""
    if not half:
        return Tile(16, 16, 4, 1) if with_tangent else Tile(32, 16, 8, 1)
    if not with_tangent:
        return Tile(128, 64 if head <= 64 else 32, 8, 3)
    # Two outputs in registers; more keys than rows have the warps share a row's columns.
    return Tile(64, 32, 4, 2) if head <= 64 else Tile(32, 64, 8, 2)


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    d_query,
    d_key,
    d_value,
    out,
    d_out,
    log_sum,
    lengths,
    heads,
    rows,
    keys,
    scale,
    CAUSAL: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Output and tangent of ROWS queries, by online softmax: sums are rescaled when a row's maximum grows.

    Summed over the keys, with P = exp(S - maximum): total = P 1, output = P V and, of the tangent,
    d_total = (P o dS) 1, d_output = (P o dS) V + P dV. A tangent that is None costs nothing.
    """
    tile, place = place_of(tl.program_id(0), tl.cdiv(rows, ROWS), heads)
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    q = load_rows(query, place, first, rows, ROWS, HEAD, WIDTH)
    if d_query is not None:
        dq = load_rows(d_query, place, first, rows, ROWS, HEAD, WIDTH)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    d_total = tl.zeros([ROWS], tl.float32)
    d_output = tl.zeros([ROWS, WIDTH], tl.float32)
    visible = visible_keys(lengths, place[0], keys)
    end = visible
    if CAUSAL:
        end = tl.minimum(visible, first + ROWS)
    for start in range(0, end, KEYS):
        k = load_rows(key, place, start, visible, KEYS, HEAD, WIDTH)
        v = load_rows(value, place, start, visible, KEYS, HEAD, WIDTH)
        scores = product(place, query, q, first, rows, key, k, start, visible, HEAD) * (scale * LOG2_E)
        column = start + tl.arange(0, KEYS)
        seen = seen_keys(row[:, None], column[None, :], visible, CAUSAL)
        scores = tl.where(seen, scores, float("-inf"))
        # Never -inf: a block holds one key at least, and every row sees the first.
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - higher)
        p = tl.exp2(scores - higher[:, None])
        maximum = higher
        total = total * shrink + tl.sum(p, 1)
        output = tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision="ieee")
        if d_out is not None:
            d_output = d_output * shrink[:, None]
        if d_query is not None or d_key is not None:
            d_scores = tl.zeros([ROWS, KEYS], tl.float32)
            if d_query is not None:
                d_scores += product(place, d_query, dq, first, rows, key, k, start, visible, HEAD)
            if d_key is not None:
                dk = load_rows(d_key, place, start, visible, KEYS, HEAD, WIDTH)
                d_scores += product(place, query, q, first, rows, d_key, dk, start, visible, HEAD)
            d_scores = p * d_scores * scale
            d_total = d_total * shrink + tl.sum(d_scores, 1)
            d_output = tl.dot(d_scores.to(v.dtype), v, d_output, input_precision="ieee")
        if d_value is not None:
            dv = load_rows(d_value, place, start, visible, KEYS, HEAD, WIDTH)
            d_output = tl.dot(p.to(v.dtype), dv, d_output, input_precision="ieee")
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    inverse = 1 / total
    output *= inverse[:, None]
    store_rows(out, place, first, rows, output, HEAD)
    if d_out is not None:
        d_output = d_output * inverse[:, None] - output * (d_total * inverse)[:, None]
        store_rows(d_out, place, first, rows, d_output, HEAD)
    # A row without keys gets infinity, which makes exp2(scores - log_sum) zero in its gradients.
    at_row = (place[0] * heads + place[1]) * rows + row
    tl.store(log_sum + at_row, tl.where(empty, float("inf"), maximum + tl.log2(total)), mask=row < rows)


def configurations(dtype: str) -> list[Configuration]:
    """How the kernel is compiled for tensors of a dtype that Triton calls `fp32`, `fp16` or `bf16`.

    Self-attention with the widest head, and a padded head with all that makes a launch slower: causal, with lengths.
    In halves also narrow heads, which have a tile of their own, and the tangent of cross-attention.
    """
    tangents = {"d_query", "d_key", "d_value", "d_out"}
    launches: list[tuple[str, int, bool, set[str]]] = [
        ("forward-128", 128, False, {*tangents, "lengths"}),
        ("forward-72-causal", 72, True, tangents),
        ("tangent-128", 128, False, {"lengths"}),
        ("tangent-72-causal", 72, True, set()),
    ]
    half = dtype != "fp32"
    if half:
        launches += [
            ("forward-64", 64, False, {*tangents, "lengths"}),
            ("tangent-64", 64, False, {"lengths"}),
            ("tangent-72-query", 72, False, {"d_key", "d_value", "lengths"}),
        ]
    return [
        configuration(name, forward_kernel, tile_of(half, head, "d_out" not in absent), dtype, head, causal, absent)
        for name, head, causal, absent in launches
    ]
