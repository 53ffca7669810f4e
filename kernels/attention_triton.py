"""Triton source of attention, its forward-mode derivative and its gradients; imported on CUDA only.

Scores are kept in base 2, exp(x) = 2^(x log2 e), which is what the hardware computes. `tl.dot` is told "ieee" so that
float32 is multiplied in float32: TF32, the default, keeps 10 bits of the mantissa, and a tangent is a difference of
sums that cancel. Halves take the tensor cores either way, and are summed in float32.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from triton import language as tl

from .compilation import Configuration

LOG2_E = tl.constexpr(1.4426950408889634)


class Matrices(NamedTuple):
    """A matrix of each batch and head: where they are in memory, in numbers from one to the next."""

    pointer: Any
    batch: Any
    head: Any
    row: Any


class Tile(NamedTuple):
    """What one program computes at a time, rows of queries by keys, and with how many warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, lengths: Tensor | None
) -> Tensor:
    """`attention`; if the tensors carry tangents, so does the output, and one kernel computes both."""
    duals = [forward_ad.unpack_dual(tensor) for tensor in (query, key, value)]  # type: ignore[no-untyped-call]
    # Torch's symbolic zeros have no memory that a kernel could read.
    tangents = [None if d is None or d._is_zerotensor() else d for _, d in duals]
    out: Tensor
    out, d_out, _ = Attention.apply(*(primal for primal, _ in duals), *tangents, causal, scale, lengths)  # type: ignore[no-untyped-call]
    if d_out is not None:
        out = forward_ad.make_dual(out, d_out)  # type: ignore[no-untyped-call]
    return out


def attend_with_tangent(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`attention_with_tangent`, all arguments given."""
    out, d_out, _ = Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    return out, torch.zeros_like(out) if d_out is None else d_out


class Attention(torch.autograd.Function):
    """Output, tangent (None if every tangent is) and base-2 logarithm of each row's sum of exponentials."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """See `launch`."""
        return launch(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor]) -> None:
        """Keep what `launch_gradients` takes."""
        query, key, value, _, _, _, ctx.causal, ctx.scale, lengths = inputs
        out, _, log_sum = output
        ctx.save_for_backward(query, key, value, out, log_sum, lengths)
        ctx.mark_non_differentiable(log_sum)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, tangent_gradient: Tensor | None, _: None) -> tuple[Any, ...]:
        """Gradients of query, key and value."""
        if tangent_gradient is not None:
            raise NotImplementedError("the tangent of attention has no gradient: detach it, as sCM and MeanFlow do")
        if gradient is None:
            return (None,) * 9
        gradients = Gradients.apply(gradient, *ctx.saved_tensors, ctx.causal, ctx.scale)  # type: ignore[no-untyped-call]
        return *gradients, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Reached only where a gradient is taken first: `attend` sees to every other tangent."""
        raise NotImplementedError("attention's gradient has no tangent: take the tangent first, then the gradient")


class Gradients(torch.autograd.Function):
    """What `Attention.backward` computes; a function of its own, so that `torch.func.grad` can call it."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `launch_gradients`."""
        return launch_gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        """Attention is differentiated once."""
        raise NotImplementedError("attention has no second derivative: use attention_reference where one is needed")


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
    out, d_out = _empty(query), _empty(query) if with_tangent else None
    log_sum = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    kind = "tangent" if with_tangent else "forward"
    _run(
        forward_kernel,
        kind,
        (query, key, value, d_query, d_key, d_value, out, d_out),
        (log_sum, lengths),
        causal,
        scale,
    )
    return out, d_out, log_sum


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
    query_gradient, key_gradient, value_gradient = _empty(query), _empty(key), _empty(key)
    vectors = log_sum, torch.empty_like(log_sum), lengths
    operands = query, key, value, gradient
    _run(query_kernel, "query", (*operands, out, query_gradient), vectors, causal, scale)
    _run(key_kernel, "key", (*operands, key_gradient, value_gradient), vectors, causal, scale)
    return query_gradient, key_gradient, value_gradient


def _run(
    kernel: Any,
    kind: str,
    matrices: tuple[Tensor | None, ...],
    vectors: tuple[Tensor | None, ...],
    causal: bool,
    scale: float | None,
) -> None:
    """Launch one program per tile of each head."""
    query, key = matrices[:2]
    assert query is not None
    assert key is not None
    batch, heads, rows, head = query.shape
    keys = key.shape[2]
    tile = tile_of(kind, query.dtype != torch.float32, head)
    tiles = triton.cdiv(keys, tile.keys) if kind == "key" else triton.cdiv(rows, tile.rows)
    if batch * heads * tiles == 0:
        return
    # Triton launches on the current device, wherever the pointers lead.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        kernel[(batch * heads * tiles,)](
            *(_matrices(tensor) for tensor in matrices),
            *vectors,
            heads,
            rows,
            keys,
            head**-0.5 if scale is None else float(scale),  # an integer would be compiled in
            **_constants(causal, head, tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _constants(causal: bool, head: int, tile: Tile) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(head))  # tensor cores multiply sixteen at least
    return {"CAUSAL": causal, "HEAD": head, "WIDTH": width, "ROWS": tile.rows, "KEYS": tile.keys}


def _empty(like: Tensor) -> Tensor:
    """Contiguous, or with the heads inside each row if that is how they come: a transformer's layout.

    Aligned as `_matrices` wants it, so that what a kernel writes there is not written to a copy.
    """
    heads_inside = like.stride(1) < like.stride(2)
    shape = like.transpose(1, 2).shape if heads_inside else like.shape
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    return tensor.transpose(1, 2) if heads_inside else tensor


def _matrices(tensor: Tensor | None) -> Matrices | None:
    """A tensor as the kernels address it: each row contiguous from a multiple of 16 bytes on, else it is copied."""
    if tensor is None:
        return None
    unit = 16 // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    if tensor.stride(3) != 1 or tensor.data_ptr() % 16 or any(stride % unit for stride in strides):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return Matrices(tensor, *tensor.stride()[:3])


@triton.jit
def _place(program, tiles, heads):  # type: ignore[no-untyped-def]
    """Tile, and batch and head; late tiles first, because the later a causal row, the more keys it sees."""
    pair = program // tiles
    return tiles - 1 - program % tiles, ((pair // heads).to(tl.int64), (pair % heads).to(tl.int64))


@triton.jit
def _visible(lengths, batch, keys):  # type: ignore[no-untyped-def]
    """How many keys a sample has."""
    if lengths is not None:
        keys = tl.minimum(keys, tl.load(lengths + batch))
    return keys


@triton.jit  # type: ignore[untyped-decorator]
def _seen(row, column, visible, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which keys count in which rows."""
    seen = column < visible
    if CAUSAL:
        seen = seen & (column <= row)
    return seen


@triton.jit  # type: ignore[untyped-decorator]
def _locate(  # type: ignore[no-untyped-def]
    matrices, place, first, end, column, SIZE: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr
):
    """Where SIZE rows from `first` and WIDTH columns from `column` are, and which lie before row `end` and HEAD.

    In int64, which reaches beyond 2^31 numbers.
    """
    start = place[0] * matrices.batch + place[1] * matrices.head + tl.cast(first, tl.int64) * matrices.row + column
    steps = tl.arange(0, SIZE).to(tl.int64)[:, None] * matrices.row + tl.arange(0, WIDTH)[None, :]
    inside = (first + tl.arange(0, SIZE) < end)[:, None] & (column + tl.arange(0, WIDTH) < HEAD)[None, :]
    return tl.multiple_of(matrices.pointer + start + steps, (16, 16)), inside  # `_matrices` sees to the alignment


@triton.jit  # type: ignore[untyped-decorator]
def _load(  # type: ignore[no-untyped-def]
    matrices, place, first, end, SIZE: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, column=0
):
    """SIZE rows from `first` on, zero from row `end` on and beyond column HEAD."""
    pointers, inside = _locate(matrices, place, first, end, column, SIZE, HEAD, WIDTH)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store(matrices, place, first, end, numbers, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    pointers, inside = _locate(matrices, place, first, end, 0, numbers.shape[0], HEAD, numbers.shape[1])
    tl.store(pointers, numbers.to(pointers.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    place, left, a, first, end, right, b, start, stop, HEAD: tl.constexpr
):
    """A B^T of rows of `left` and `right`.

    Float32, which the tensor cores do not multiply, has each thread hold whole rows of both, and does not fit; it is
    read again, from the cache, a few columns at a time.
    """
    if a.dtype == tl.float32:
        total = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        for column in range(0, a.shape[1], 16):
            some_a = _load(left, place, first, end, a.shape[0], HEAD, 16, column)
            some_b = _load(right, place, start, stop, b.shape[0], HEAD, 16, column)
            total = tl.dot(some_a, some_b.T, total, input_precision="ieee")
    else:
        total = tl.dot(a, b.T)
    return total


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
    tile, place = _place(tl.program_id(0), tl.cdiv(rows, ROWS), heads)
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    q = _load(query, place, first, rows, ROWS, HEAD, WIDTH)
    if d_query is not None:
        dq = _load(d_query, place, first, rows, ROWS, HEAD, WIDTH)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    d_total = tl.zeros([ROWS], tl.float32)
    d_output = tl.zeros([ROWS, WIDTH], tl.float32)
    visible = _visible(lengths, place[0], keys)
    end = visible
    if CAUSAL:
        end = tl.minimum(visible, first + ROWS)
    for start in range(0, end, KEYS):
        k = _load(key, place, start, visible, KEYS, HEAD, WIDTH)
        v = _load(value, place, start, visible, KEYS, HEAD, WIDTH)
        scores = _product(place, query, q, first, rows, key, k, start, visible, HEAD) * (scale * LOG2_E)
        column = start + tl.arange(0, KEYS)
        seen = _seen(row[:, None], column[None, :], visible, CAUSAL)
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
                d_scores += _product(place, d_query, dq, first, rows, key, k, start, visible, HEAD)
            if d_key is not None:
                dk = _load(d_key, place, start, visible, KEYS, HEAD, WIDTH)
                d_scores += _product(place, query, q, first, rows, d_key, dk, start, visible, HEAD)
            d_scores = p * d_scores * scale
            d_total = d_total * shrink + tl.sum(d_scores, 1)
            d_output = tl.dot(d_scores.to(v.dtype), v, d_output, input_precision="ieee")
        if d_value is not None:
            dv = _load(d_value, place, start, visible, KEYS, HEAD, WIDTH)
            d_output = tl.dot(p.to(v.dtype), dv, d_output, input_precision="ieee")
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    inverse = 1 / total
    output *= inverse[:, None]
    _store(out, place, first, rows, output, HEAD)
    if d_out is not None:
        d_output = d_output * inverse[:, None] - output * (d_total * inverse)[:, None]
        _store(d_out, place, first, rows, d_output, HEAD)
    # A row without keys gets infinity, which makes exp2(scores - log_sum) zero in its gradients.
    at_row = (place[0] * heads + place[1]) * rows + row
    tl.store(log_sum + at_row, tl.where(empty, float("inf"), maximum + tl.log2(total)), mask=row < rows)


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
    tile, place = _place(tl.program_id(0), tl.cdiv(rows, ROWS), heads)
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    q = _load(query, place, first, rows, ROWS, HEAD, WIDTH)
    g = _load(gradient, place, first, rows, ROWS, HEAD, WIDTH)
    o = _load(out, place, first, rows, ROWS, HEAD, WIDTH)
    at_row = (place[0] * heads + place[1]) * rows + row
    row_sum = tl.load(log_sum + at_row, mask=row < rows, other=float("inf"))
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + at_row, row_delta, mask=row < rows)
    visible = _visible(lengths, place[0], keys)
    end = visible
    if CAUSAL:
        end = tl.minimum(visible, first + ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, end, KEYS):
        k = _load(key, place, start, visible, KEYS, HEAD, WIDTH)
        v = _load(value, place, start, visible, KEYS, HEAD, WIDTH)
        column = start + tl.arange(0, KEYS)
        seen = _seen(row[:, None], column[None, :], visible, CAUSAL)
        p = tl.exp2(
            _product(place, query, q, first, rows, key, k, start, visible, HEAD) * (scale * LOG2_E) - row_sum[:, None]
        )
        d_scores = tl.where(seen, p, 0.0) * (
            _product(place, gradient, g, first, rows, value, v, start, visible, HEAD) - row_delta[:, None]
        )
        total = tl.dot(d_scores.to(k.dtype), k, total, input_precision="ieee")
    _store(query_gradient, place, first, rows, total * scale, HEAD)


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
    tile, place = _place(tl.program_id(0), tl.cdiv(keys, KEYS), heads)
    first = tile * KEYS
    column = first + tl.arange(0, KEYS)
    visible = _visible(lengths, place[0], keys)
    k = _load(key, place, first, visible, KEYS, HEAD, WIDTH)
    v = _load(value, place, first, visible, KEYS, HEAD, WIDTH)
    k_total = tl.zeros([KEYS, WIDTH], tl.float32)
    v_total = tl.zeros([KEYS, WIDTH], tl.float32)
    begin = 0
    if CAUSAL:
        begin = first // ROWS * ROWS  # earlier rows see none of these keys
    for start in range(begin, tl.where(first < visible, rows, 0), ROWS):
        q = _load(query, place, start, rows, ROWS, HEAD, WIDTH)
        g = _load(gradient, place, start, rows, ROWS, HEAD, WIDTH)
        row = start + tl.arange(0, ROWS)
        at_row = (place[0] * heads + place[1]) * rows + row
        row_sum = tl.load(log_sum + at_row, mask=row < rows, other=float("inf"))
        row_delta = tl.load(delta + at_row, mask=row < rows, other=0.0)
        seen = _seen(row[None, :], column[:, None], visible, CAUSAL)
        p = tl.exp2(
            _product(place, key, k, first, visible, query, q, start, rows, HEAD) * (scale * LOG2_E) - row_sum[None, :]
        )
        p = tl.where(seen, p, 0.0)
        v_total = tl.dot(p.to(g.dtype), g, v_total, input_precision="ieee")
        d_scores = p * (_product(place, value, v, first, visible, gradient, g, start, rows, HEAD) - row_delta[None, :])
        k_total = tl.dot(d_scores.to(q.dtype), q, k_total, input_precision="ieee")
    _store(key_gradient, place, first, keys, k_total * scale, HEAD)
    _store(value_gradient, place, first, keys, v_total, HEAD)


KERNELS = {"forward": forward_kernel, "tangent": forward_kernel, "query": query_kernel, "key": key_kernel}


def tile_of(kind: str, half: bool, width: int) -> Tile:
    """The largest tile found that no supported GPU lacks registers (255 a thread) or shared memory (99 KiB) for."""
    if not half:
        return {"tangent": Tile(16, 16, 4, 1), "key": Tile(16, 32, 8, 1)}.get(kind, Tile(32, 16, 8, 1))
    if kind == "forward":
        return Tile(128, 64 if width <= 64 else 32, 8, 3)
    if kind == "tangent":  # two outputs in registers; more keys than rows have the warps share a row's columns
        return Tile(64, 32, 4, 2) if width <= 64 else Tile(32, 64, 8, 2)
    return Tile(64, 32, 4, 2) if kind == "query" else Tile(64, 64, 8, 2)


def configurations(dtype: str) -> list[Configuration]:
    """How the kernels are compiled for tensors of a dtype that Triton calls `fp32`, `fp16` or `bf16`."""
    kinds = [(kind, 128) for kind in KERNELS]
    if dtype != "fp32":  # narrow heads have tiles of their own in these only
        kinds += [("forward", 64), ("tangent", 64)]
    return [_configuration(kind, width, dtype) for kind, width in kinds]


def _configuration(kind: str, width: int, dtype: str) -> Configuration:
    """Full attention with every tangent, or none."""
    kernel, tile = KERNELS[kind], tile_of(kind, dtype != "fp32", width)
    absent = {"lengths"} | ({"d_query", "d_key", "d_value", "d_out"} if kind == "forward" else set())
    constants = _constants(False, width, tile) | dict.fromkeys(absent)
    types: dict[str, Any] = dict.fromkeys(kernel.arg_names, Matrices(f"*{dtype}", "i64", "i64", "i64"))
    for kinds, names in {"*fp32": ("log_sum", "delta"), "i32": ("heads", "rows", "keys"), "fp32": ("scale",)}.items():
        types |= {name: kinds for name in names if name in types}
    types = {name: types[name] for name in types.keys() - constants.keys()}
    return Configuration(f"{kind}-{width}", kernel, types, constants, tile.warps, tile.stages)
