"""Triton source of the gated residual and of the modulated norm after it, one of them or both; imported on CUDA only.

A row is a token. A program takes rows of one sample, whose scale, shift and gate stay in the cache next to it.
`adaptive_norm_autograd.py` launches the kernels.
"""

from typing import Any

import triton
from triton import language as tl

from .compilation import Configuration

LARGEST = 4096
"""Columns that a program holds in registers."""
PIECE = 1024
"""Columns of a program's share in rows that are longer, whose sums take a kernel of their own."""
WALK = {"BLOCK": 4096, "num_warps": 8}
"""How a program of that kernel goes along its row."""
PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors: at least that many forward if there are rows, about as many backward.

One number for all GPUs: what is summed over rows is summed in the same order on each.
"""


def forward_tile(batch: int, rows: int, columns: int) -> dict[str, Any]:
    """16 numbers a thread: several loads of 16 bytes are under way at once, and several rows share the vectors.

    8 in wide rows: the assembler would spill some of 16 in half precision.
    """
    return _tile(batch, rows, columns, numbers=4096, of_thread=16 if columns <= 2048 else 8)


def backward_tile(batch: int, rows: int, columns: int) -> tuple[dict[str, Any], int]:
    """8 numbers a thread, for as many as ten tiles are alive at once; and how many rows a program goes through."""
    tile = _tile(batch, rows, columns, numbers=2048, of_thread=8)
    blocks = max(1, PROGRAMS // max(1, batch))
    return tile, tile["ROWS"] * max(1, triton.cdiv(rows, blocks * tile["ROWS"]))


def _tile(batch: int, rows: int, columns: int, numbers: int, of_thread: int) -> dict[str, Any]:
    """What a program does at once: about so many numbers, fewer rows where there would be too few programs."""
    block = triton.next_power_of_2(max(columns, 1)) if columns <= LARGEST else PIECE
    tile = max(1, numbers // block)
    while tile > 1 and batch * triton.cdiv(rows, tile) < PROGRAMS:
        tile //= 2
    warps = min(max(1, tile * block // (32 * of_thread)), 16)
    return {"ROWS": tile, "BLOCK": block, "WHOLE": columns <= LARGEST, "COLUMNS": columns, "num_warps": warps}


@triton.jit  # type: ignore[untyped-decorator]
def _load(pointer, offset, inside, ABSENT: tl.constexpr = 0.0):  # type: ignore[no-untyped-def]
    """Numbers as float32, 0 outside; `ABSENT` where there is no tensor."""
    if pointer is not None:
        tile = tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        tile = tl.full(inside.shape, ABSENT, tl.float32)
    return tile


@triton.jit
def _store(pointer, offset, tile, inside):  # type: ignore[no-untyped-def]
    """Numbers in the tensor's dtype, if there is one."""
    if pointer is not None:
        tl.store(pointer + offset, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _vector(  # type: ignore[no-untyped-def]
    pointer, batch, batch_stride, row, row_stride, column, inside, within,
    BY_ROW: tl.constexpr, ABSENT: tl.constexpr = 0.0,
):  # fmt: skip
    """(ROWS, BLOCK) of a vector that each row has, (1, BLOCK) of one that all of the sample's rows share."""
    if BY_ROW:
        vector = _load(pointer, batch * batch_stride + row[:, None] * row_stride + column, inside)
    else:
        vector = _load(pointer, batch * batch_stride + column, within, ABSENT)
    return vector


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    x_pointer, branch_pointer, gate_pointer, gate_batch_stride, gate_row_stride,
    scale_pointer, scale_batch_stride, scale_row_stride, shift_pointer, shift_batch_stride, shift_row_stride,
    weight_pointer, bias_pointer, stream_pointer, normed_pointer, statistics_pointer, rows, blocks, epsilon,
    KIND: tl.constexpr, GATE_BY_ROW: tl.constexpr, BY_ROW: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of a sample: their stream if there is a branch, their norm if there is a kind."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    within = column < COLUMNS
    inside = (row < rows)[:, None] & within
    position = batch * rows + row
    offset = position[:, None] * COLUMNS + column
    x = _load(x_pointer, offset, inside)
    if branch_pointer is not None:
        gate = _vector(
            gate_pointer, batch, gate_batch_stride, row, gate_row_stride, column, inside, within, GATE_BY_ROW, 1.0
        )
        stream = (x + gate * _load(branch_pointer, offset, inside)).to(stream_pointer.dtype.element_ty)
        tl.store(stream_pointer + offset, stream, mask=inside)
        x = stream.to(tl.float32)
    if normed_pointer is not None:
        if WHOLE:
            mean = tl.zeros([ROWS], tl.float32)
            if KIND == "layer":
                mean = tl.sum(x, axis=1) / COLUMNS
            centred = tl.where(inside, x - mean[:, None], 0.0)
            inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / COLUMNS + epsilon)
            _store(statistics_pointer, 2 * position, mean, row < rows)
            _store(statistics_pointer, 2 * position + 1, inverse, row < rows)
        else:
            mean = _load(statistics_pointer, 2 * position, row < rows)
            inverse = _load(statistics_pointer, 2 * position + 1, row < rows)
        scale = _vector(scale_pointer, batch, scale_batch_stride, row, scale_row_stride, column, inside, within, BY_ROW)
        shift = _vector(shift_pointer, batch, shift_batch_stride, row, shift_row_stride, column, inside, within, BY_ROW)
        inner = (x - mean[:, None]) * inverse[:, None] * _load(weight_pointer, column, within, 1.0) + _load(
            bias_pointer, column, within
        )
        _store(normed_pointer, offset, inner * (1.0 + scale) + shift, inside)


@triton.jit  # type: ignore[untyped-decorator]
def row_statistics(  # type: ignore[no-untyped-def]
    x_pointer, statistics_pointer, epsilon, KIND: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and inverse deviation of a row longer than `LARGEST`."""
    position = tl.program_id(0).to(tl.int64)
    mean = 0.0
    if KIND == "layer":
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            total += _load(x_pointer, position * COLUMNS + column, column < COLUMNS)
        mean = tl.sum(total, axis=0) / COLUMNS
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _load(x_pointer, position * COLUMNS + column, column < COLUMNS)
        centred = tl.where(column < COLUMNS, x - mean, 0.0)
        squares += centred * centred
    tl.store(statistics_pointer + 2 * position, mean)
    tl.store(statistics_pointer + 2 * position + 1, tl.rsqrt(tl.sum(squares, axis=0) / COLUMNS + epsilon))


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    d_stream_pointer, d_normed_pointer, x_pointer, branch_pointer, gate_pointer, gate_batch_stride, gate_row_stride,
    scale_pointer, scale_batch_stride, scale_row_stride, weight_pointer, bias_pointer,
    statistics_pointer, means_pointer, d_x_pointer, d_branch_pointer, d_gate_pointer, d_scale_pointer,
    products_pointer, totals_pointer, rows, blocks, span,
    KIND: tl.constexpr, GATE_BY_ROW: tl.constexpr, BY_ROW: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`span` rows of a sample, `ROWS` at a time; what is summed over them stays in registers to the end.

    With `inner = norm(x) * weight + bias`, `products` are sums of `d_inner * norm(x)` and `totals` of `d_inner`; where
    `1 + scale` is the sample's, `d_normed` is summed instead, for the factor can be multiplied into the sum.
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    first = program % blocks * span
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    within = column < COLUMNS
    gates = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    totals = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + span, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & within
        position = batch * rows + row
        offset = position[:, None] * COLUMNS + column
        d_x = _load(d_stream_pointer, offset, inside)
        if d_normed_pointer is not None:
            mean = _load(statistics_pointer, 2 * position, row < rows)[:, None]
            inverse = _load(statistics_pointer, 2 * position + 1, row < rows)[:, None]
            x = (_load(x_pointer, offset, inside) - mean) * inverse
            d_normed = _load(d_normed_pointer, offset, inside)
            scale = _vector(
                scale_pointer, batch, scale_batch_stride, row, scale_row_stride, column, inside, within, BY_ROW
            )
            weight = _load(weight_pointer, column, within, 1.0)
            d_inner = d_normed * (1.0 + scale)
            d_norm = d_inner * weight
            summed = d_inner if BY_ROW else d_normed
            products += summed * x
            totals += summed
            _store(d_scale_pointer, offset, d_normed * (x * weight + _load(bias_pointer, column, within)), inside)
            if WHOLE:
                mean_product = tl.sum(d_norm * x, axis=1, keep_dims=True) / COLUMNS
                mean_total = tl.sum(d_norm, axis=1, keep_dims=True) / COLUMNS
            else:
                mean_product = _load(means_pointer, 2 * position, row < rows)[:, None]
                mean_total = _load(means_pointer, 2 * position + 1, row < rows)[:, None]
            d_norm -= x * mean_product
            if KIND == "layer":
                d_norm -= mean_total
            d_x += inverse * d_norm
            _store(d_x_pointer, offset, d_x, inside)
        if d_branch_pointer is not None:
            gate = _vector(
                gate_pointer, batch, gate_batch_stride, row, gate_row_stride, column, inside, within, GATE_BY_ROW
            )
            _store(d_branch_pointer, offset, d_x * gate, inside)
        if d_gate_pointer is not None:
            d_gate = d_x * _load(branch_pointer, offset, inside)
            if GATE_BY_ROW:
                _store(d_gate_pointer, offset, d_gate, inside)
            gates += d_gate
    sums = program * COLUMNS + column
    _store(products_pointer, sums, tl.sum(products, axis=0, keep_dims=True), within)
    _store(totals_pointer, sums, tl.sum(totals, axis=0, keep_dims=True), within)
    if not GATE_BY_ROW:
        _store(d_gate_pointer, sums, tl.sum(gates, axis=0, keep_dims=True), within)


@triton.jit  # type: ignore[untyped-decorator]
def row_means(  # type: ignore[no-untyped-def]
    d_normed_pointer, x_pointer, scale_pointer, scale_batch_stride, scale_row_stride, weight_pointer,
    statistics_pointer, means_pointer, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of `d_norm * norm(x)` and of `d_norm` over a row longer than `LARGEST`."""
    position = tl.program_id(0).to(tl.int64)
    scale_offset = position // rows * scale_batch_stride + position % rows * scale_row_stride
    mean = tl.load(statistics_pointer + 2 * position)
    inverse = tl.load(statistics_pointer + 2 * position + 1)
    products = tl.zeros([BLOCK], tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = column < COLUMNS
        d_norm = _load(d_normed_pointer, position * COLUMNS + column, within)
        d_norm *= 1.0 + _load(scale_pointer, scale_offset + column, within)
        d_norm *= _load(weight_pointer, column, within, 1.0)
        products += d_norm * (_load(x_pointer, position * COLUMNS + column, within) - mean) * inverse
        totals += d_norm
    tl.store(means_pointer + 2 * position, tl.sum(products, axis=0) / COLUMNS)
    tl.store(means_pointer + 2 * position + 1, tl.sum(totals, axis=0) / COLUMNS)


def configurations(dtype: str) -> list[Configuration]:
    """Every operation on DiT-XL's rows, the widest that are held, and longer ones; `fp32`, `fp16` or `bf16`."""
    no_branch = ("branch", "gate", "stream", "d_stream", "d_branch", "d_gate")
    no_norm = ("scale", "shift", "weight", "bias", "normed", "statistics", "d_normed", "d_x", "products", "totals")
    ungated = ("gate", "branch", "d_branch", "d_gate", "scale", "shift", "d_scale", "means")
    cases: list[tuple[str, int, str | None, bool, tuple[str, ...]]] = [
        ("norm", 1152, "rms", False, (*no_branch, "weight", "bias", "d_scale", "means")),
        ("residual", 1152, None, False, (*no_norm, "d_scale", "means")),
        ("residual-norm", 1152, "layer", True, ("means",)),
        ("ungated-residual-norm", 1280, "layer", False, ungated),
        ("wide-residual-norm", LARGEST, "layer", False, ("means",)),
        ("long-norm", 2 * LARGEST, "layer", False, (*no_branch, "d_scale")),
    ]
    found = []
    for name, columns, kind, by_row, absent in cases:
        constants: dict[str, Any] = {f"{pointer}_pointer": None for pointer in absent}
        constants |= {"KIND": kind, "GATE_BY_ROW": by_row, "BY_ROW": by_row}
        tiles = {forward_kernel: forward_tile(1, 4096, columns), backward_kernel: backward_tile(1, 4096, columns)[0]}
        found += [_configuration(name, kernel, dtype, constants | tile) for kernel, tile in tiles.items()]
    walk = {"KIND": "layer", "COLUMNS": 2 * LARGEST, **WALK}
    return found + [_configuration("long-norm", kernel, dtype, walk) for kernel in (row_statistics, row_means)]


def _configuration(name: str, kernel: Any, dtype: str, constants: dict[str, Any]) -> Configuration:
    """Sums are float32; sizes and strides are 32-bit integers."""
    wide = {"statistics_pointer", "means_pointer", "products_pointer", "totals_pointer"}
    types = {}
    for parameter in kernel.arg_names:
        number = "fp32" if parameter == "epsilon" else "i32"
        pointer = "*fp32" if parameter in wide else f"*{dtype}"
        if parameter not in constants:
            types[parameter] = pointer if parameter.endswith("_pointer") else number
    known = {parameter: value for parameter, value in constants.items() if parameter in kernel.arg_names}
    return Configuration(f"{kernel.__name__}-{name}", kernel, types, known, constants["num_warps"])
