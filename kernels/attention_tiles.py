"""What the kernels of attention share: how they are launched, and how a tile is read, multiplied and written.

`tl.dot` is told "ieee" so that float32 is multiplied in float32: TF32, the default, keeps 10 bits of the mantissa, and
a tangent is a difference of sums that cancel. Halves take the tensor cores either way, and are summed in float32.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
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


def run(
    kernel: Any,
    tile: Tile,
    tiles: int,
    matrices: tuple[Tensor | None, ...],
    vectors: tuple[Tensor | None, ...],
    causal: bool,
    scale: float | None,
) -> None:
    """Launch one program for each of a head's `tiles`; `matrices` begin with query and key."""
    query, key = matrices[:2]
    assert query is not None
    assert key is not None
    batch, heads, rows, head = query.shape
    if batch * heads * tiles == 0:
        return
    # Triton launches on the current device, wherever the pointers lead.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        kernel[(batch * heads * tiles,)](
            *(matrices_of(tensor) for tensor in matrices),
            *vectors,
            heads,
            rows,
            key.shape[2],
            head**-0.5 if scale is None else float(scale),  # an integer would be compiled in
            **constants_of(causal, head, tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def configuration(
    name: str, kernel: Any, tile: Tile, dtype: str, head: int, causal: bool = False, absent: Collection[str] = ()
) -> Configuration:
    """How `run` has a kernel compiled for tensors of a dtype, in Triton's words, if some parameters are None."""
    constants = constants_of(causal, head, tile) | dict.fromkeys(absent)
    types: dict[str, Any] = dict.fromkeys(kernel.arg_names, Matrices(f"*{dtype}", "i64", "i64", "i64"))
    types |= dict.fromkeys(("log_sum", "delta"), "*fp32") | {"lengths": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("heads", "rows", "keys"), "i32")
    taken = {name: types[name] for name in kernel.arg_names if name not in constants}
    return Configuration(name, kernel, taken, constants, tile.warps, tile.stages)


def constants_of(causal: bool, head: int, tile: Tile) -> dict[str, Any]:
    """Compile-time parameters of every kernel."""
    width = max(16, triton.next_power_of_2(head))  # tensor cores multiply sixteen at least
    return {"CAUSAL": causal, "HEAD": head, "WIDTH": width, "ROWS": tile.rows, "KEYS": tile.keys}


def empty(like: Tensor) -> Tensor:
    """Contiguous, or with the heads inside each row if that is how they come: a transformer's layout.

    Aligned as `matrices_of` wants it, so that what a kernel writes there is not written to a copy.
    """
    heads_inside = like.stride(1) < like.stride(2)
    shape = like.transpose(1, 2).shape if heads_inside else like.shape
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    return tensor.transpose(1, 2) if heads_inside else tensor


def matrices_of(tensor: Tensor | None) -> Matrices | None:
    """A tensor as the kernels address it: each row contiguous from a multiple of 16 bytes on, else it is copied."""
    if tensor is None:
        return None
    unit = 16 // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    if tensor.stride(3) != 1 or tensor.data_ptr() % 16 or any(stride % unit for stride in strides):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return Matrices(tensor, *tensor.stride()[:3])


@triton.jit
def place_of(program, tiles, heads):  # type: ignore[no-untyped-def]
    """Tile, and batch and head; late tiles first, because the later a causal row, the more keys it sees."""
    pair = program // tiles
    return tiles - 1 - program % tiles, ((pair // heads).to(tl.int64), (pair % heads).to(tl.int64))


@triton.jit
def visible_keys(lengths, batch, keys):  # type: ignore[no-untyped-def]
    """How many keys a sample has."""
    if lengths is not None:
        keys = tl.minimum(keys, tl.load(lengths + batch))
    return keys


@triton.jit  # type: ignore[untyped-decorator]
def seen_keys(row, column, visible, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which keys count in which rows."""
    seen = column < visible
    if CAUSAL:
        seen = seen & (column <= row)
    return seen


@triton.jit  # type: ignore[untyped-decorator]
def locate(  # type: ignore[no-untyped-def]
    matrices, place, first, end, column, SIZE: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr
):
    """Where SIZE rows from `first` and WIDTH columns from `column` are, and which lie before row `end` and HEAD.

    In int64, which reaches beyond 2^31 numbers.
    """
    start = place[0] * matrices.batch + place[1] * matrices.head + tl.cast(first, tl.int64) * matrices.row + column
    steps = tl.arange(0, SIZE).to(tl.int64)[:, None] * matrices.row + tl.arange(0, WIDTH)[None, :]
    inside = (first + tl.arange(0, SIZE) < end)[:, None] & (column + tl.arange(0, WIDTH) < HEAD)[None, :]
    return tl.multiple_of(matrices.pointer + start + steps, (16, 16)), inside  # `matrices_of` sees to the alignment


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(  # type: ignore[no-untyped-def]
    matrices, place, first, end, SIZE: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, column=0
):
    """SIZE rows from `first` on, zero from row `end` on and beyond column HEAD."""
    pointers, inside = locate(matrices, place, first, end, column, SIZE, HEAD, WIDTH)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(matrices, place, first, end, numbers, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows from `first` on, none from row `end` on and nothing beyond column HEAD."""
    pointers, inside = locate(matrices, place, first, end, 0, numbers.shape[0], HEAD, numbers.shape[1])
    tl.store(pointers, numbers.to(pointers.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def product(  # type: ignore[no-untyped-def]
    place, left, a, first, end, right, b, start, stop, HEAD: tl.constexpr
):
    """A B^T of rows of `left` and `right`.

    Float32, which the tensor cores do not multiply, has each thread hold whole rows of both, and does not fit; it is
    read again, from the cache, a few columns at a time.
    """
    if a.dtype == tl.float32:
        total = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        for column in range(0, a.shape[1], 16):
            some_a = load_rows(left, place, first, end, a.shape[0], HEAD, 16, column)
            some_b = load_rows(right, place, start, stop, b.shape[0], HEAD, 16, column)
            total = tl.dot(some_a, some_b.T, total, input_precision="ieee")
    else:
        total = tl.dot(a, b.T)
    return total
