"""Triton source of the gradients of attention, which compute the scores again; imported on CUDA only."""

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


def launch_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One program per tile of queries, then one per tile of keys, so that no sum needs atomics."""
    query_gradient, key_gradient, value_gradient = empty(query), empty(key), empty(key)
    vectors = log_sum, torch.empty_like(log_sum), lengths
    operands = query, key, value, gradient
    half = query.dtype != torch.float32
    by_rows, by_keys = query_tile(half), key_tile(half)
    tiles = triton.cdiv(query.shape[2], by_rows.rows), triton.cdiv(key.shape[2], by_keys.keys)
    run(query_kernel, by_rows, tiles[0], (*operands, out, query_gradient), vectors, causal, scale)
    run(key_kernel, by_keys, tiles[1], (*operands, key_gradient, value_gradient), vectors, causal, scale)
    return query_gradient, key_gradient, value_gradient


def query_tile(half: bool) -> Tile:
    """The largest tile found that no supported GPU lacks registers (255 a thread) or shared memory (99 KiB) for."""
    return Tile(64, 32, 4, 2) if half else Tile(32, 16, 8, 1)


def key_tile(half: bool) -> Tile:
    """The same for `key_kernel`."""
    return Tile(64, 64, 8, 2) if half else Tile(16, 32, 8, 1)


@triton.jit  # type: ignore[untyped-decorator]
def query_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    gradient,
    out,
    query_gradient,
    log_sum,
    delta,
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
    """Gradient dS K of ROWS queries: dS = P o (G V^T - delta), with G that of the output and delta = (G o O) 1.

    Writes delta, for `key_kernel`.
    """
    tile, place = place_of(tl.program_id(0), tl.cdiv(rows, ROWS), heads)
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    q = load_rows(query, place, first, rows, ROWS, HEAD, WIDTH)
    g = load_rows(gradient, place, first, rows, ROWS, HEAD, WIDTH)
    o = load_rows(out, place, first, rows, ROWS, HEAD, WIDTH)
    at_row = (place[0] * heads + place[1]) * rows + row
    row_sum = tl.load(log_sum + at_row, mask=row < rows, other=float("inf"))
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + at_row, row_delta, mask=row < rows)
    visible = visible_keys(lengths, place[0], keys)
    end = visible
    if CAUSAL:
        end = tl.minimum(visible, first + ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, end, KEYS):
        k = load_rows(key, place, start, visible, KEYS, HEAD, WIDTH)
        v = load_rows(value, place, start, visible, KEYS, HEAD, WIDTH)
        column = start + tl.arange(0, KEYS)
        seen = seen_keys(row[:, None], column[None, :], visible, CAUSAL)
        p = tl.exp2(
            product(place, query, q, first, rows, key, k, start, visible, HEAD) * (scale * LOG2_E) - row_sum[:, None]
        )
        d_scores = tl.where(seen, p, 0.0) * (
            product(place, gradient, g, first, rows, value, v, start, visible, HEAD) - row_delta[:, None]
        )
        total = tl.dot(d_scores.to(k.dtype), k, total, input_precision="ieee")
    store_rows(query_gradient, place, first, rows, total * scale, HEAD)


@triton.jit  # type: ignore[untyped-decorator]
def key_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    gradient,
    key_gradient,
    value_gradient,
    log_sum,
    delta,
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
    """Gradients dS^T Q and P^T G of KEYS keys and values; transposed throughout, as the keys are what stays."""
    tile, place = place_of(tl.program_id(0), tl.cdiv(keys, KEYS), heads)
    first = tile * KEYS
    column = first + tl.arange(0, KEYS)
    visible = visible_keys(lengths, place[0], keys)
    k = load_rows(key, place, first, visible, KEYS, HEAD, WIDTH)
    v = load_rows(value, place, first, visible, KEYS, HEAD, WIDTH)
    k_total = tl.zeros([KEYS, WIDTH], tl.float32)
    v_total = tl.zeros([KEYS, WIDTH], tl.float32)
    begin = 0
    if CAUSAL:
        begin = first // ROWS * ROWS  # earlier rows see none of these keys
    for start in range(begin, tl.where(first < visible, rows, 0), ROWS):
        q = load_rows(query, place, start, rows, ROWS, HEAD, WIDTH)
        g = load_rows(gradient, place, start, rows, ROWS, HEAD, WIDTH)
        row = start + tl.arange(0, ROWS)
        at_row = (place[0] * heads + place[1]) * rows + row
        row_sum = tl.load(log_sum + at_row, mask=row < rows, other=float("inf"))
        row_delta = tl.load(delta + at_row, mask=row < rows, other=0.0)
        seen = seen_keys(row[None, :], column[:, None], visible, CAUSAL)
        p = tl.exp2(
            product(place, key, k, first, visible, query, q, start, rows, HEAD) * (scale * LOG2_E) - row_sum[None, :]
        )
        p = tl.where(seen, p, 0.0)
        v_total = tl.dot(p.to(g.dtype), g, v_total, input_precision="ieee")
        d_scores = p * (product(place, value, v, first, visible, gradient, g, start, rows, HEAD) - row_delta[None, :])
        k_total = tl.dot(d_scores.to(q.dtype), q, k_total, input_precision="ieee")
    store_rows(key_gradient, place, first, keys, k_total * scale, HEAD)
    store_rows(value_gradient, place, first, keys, v_total, HEAD)


def configurations(dtype: str) -> list[Configuration]:
    """How the kernels are compiled for tensors of a dtype that Triton calls `fp32`, `fp16` or `bf16`.

    Self-attention with the widest head, and a padded one with all that makes a launch differ from that; narrower heads
    take the same tiles and less of everything.
    """
    half = dtype != "fp32"
    found = []
    for kind, kernel, tile in (("query", query_kernel, query_tile(half)), ("key", key_kernel, key_tile(half))):
        found.append(configuration(f"{kind}-128", kernel, tile, dtype, 128, absent={"lengths"}))
        found.append(configuration(f"{kind}-96-causal", kernel, tile, dtype, 96, causal=True))
    return found
