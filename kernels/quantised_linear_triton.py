"""Triton source of the 8-bit linear layer: rows are quantised by one kernel, multiplied and scaled by another."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from .compilation import Configuration
from .quantised_linear import DTYPES, LEAST_MAXIMUM, LIMITS, Kind, QuantisedWeight

LONGEST_BLOCK = 16384
"""Columns that a program of 16 warps keeps in registers, 32 a thread; what a longer row has more is read twice."""
ALIGNMENT = 16
"""Rows of 8-bit values begin at multiples of it, so that every load is of 16 bytes."""
ALIGNED = tl.constexpr(ALIGNMENT)
LEAST = tl.constexpr(LEAST_MAXIMUM)
ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to a float32 below 2^22 and taken off again, it rounds to an integer, ties to even."""


class Tile(NamedTuple):
    """What one program of the product computes, and how: (m, n) of the result, k channels at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# A few rows only read the weight: narrow tiles make a program for every SM, deep ones keep 24 KiB of it on the way in
# each. The large tile reads least per product, and its three stages are what 99 KiB of shared memory hold.
SMALL_TILES = (Tile(16, 32, 256, 4, 4), Tile(32, 32, 256, 4, 4), Tile(64, 64, 128, 4, 4))
LARGE_TILE = Tile(128, 128, 128, 8, 3)
LEAST_PROGRAMS = 128
"""Large tiles are taken when there are so many of them; fewer would leave most of an H200's 132 SMs idle."""
GROUP = 8
"""Rows of tiles that consecutive programs go through together, so that their operands are still in the L2 cache."""


def tile_for(rows: int, channels: int) -> Tile:
    """The tile for a result of `rows` by `channels`."""
    if triton.cdiv(rows, LARGE_TILE.m) * triton.cdiv(channels, LARGE_TILE.n) >= LEAST_PROGRAMS and rows > 64:
        return LARGE_TILE
    return next((tile for tile in SMALL_TILES if rows <= tile.m), SMALL_TILES[-1])


def launch_quantised_linear(x: Tensor, quantised: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """(M, N) of rows (M, K)."""
    values, scales = launch_quantise_rows(x, quantised.kind)
    return launch_product(values, scales, _aligned(quantised.values), quantised.scales.contiguous(), bias, x.dtype)


def launch_quantise_rows(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Values of rows (M, K), with columns of zeros up to the next multiple of 16, and scales (M,)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, size = x.shape
    width = triton.cdiv(size, ALIGNMENT) * ALIGNMENT
    values = torch.empty(rows, width, dtype=DTYPES[kind], device=x.device)
    scales = torch.empty(rows, device=x.device)
    if rows:
        block = min(triton.next_power_of_2(max(width, ALIGNMENT)), LONGEST_BLOCK)
        # Triton launches on the current device, wherever the pointers lead.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            quantise_kernel[(rows,)](
                x, values, scales, size, x.stride(0), LIMIT=LIMITS[kind], BLOCK=block, num_warps=warps_for(block)
            )
    return values, scales


def warps_for(block: int) -> int:
    """16 columns a thread, two loads of 16-bit numbers; 32 in the longest block."""
    return max(1, min(16, block // 512))


def launch_product(
    x: Tensor, row_scales: Tensor, weight: Tensor, channel_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scaled product (M, N) of values (M, K) and (N, K), whose rows both begin at multiples of 16 bytes."""
    (rows, size), channels = x.shape, len(weight)
    result = torch.empty(rows, channels, dtype=dtype, device=x.device)
    if result.numel():
        tile = tile_for(rows, channels)
        programs = triton.cdiv(rows, tile.m) * triton.cdiv(channels, tile.n)
        arguments = (x, weight, row_scales, channel_scales, bias if bias is None else bias.contiguous(), result)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            product_kernel[(programs,)](
                *arguments,
                *(rows, channels, size, x.stride(0), weight.stride(0)),
                **_constants(tile),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    return result


def _aligned(weight: Tensor) -> Tensor:
    """The weight, copied with zeros after its rows if they do not all begin at multiples of 16 bytes."""
    missing = -weight.shape[1] % ALIGNMENT
    if not missing and weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0:
        return weight
    aligned = weight.new_zeros(len(weight), weight.shape[1] + missing)
    aligned[:, : weight.shape[1]] = weight
    return aligned


def _constants(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP}


@triton.jit  # type: ignore[untyped-decorator]
def quantise_kernel(  # type: ignore[no-untyped-def]
    x_pointer, values_pointer, scales_pointer, size, stride, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Values and scale of row `program_id`; its first block stays in registers between the maximum and the cast."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.cdiv(size, ALIGNED) * ALIGNED
    x_pointer += row * stride
    column = tl.arange(0, BLOCK)
    values_pointers = tl.multiple_of(values_pointer + row * width + column, ALIGNED)
    first = tl.load(x_pointer + column, mask=column < size, other=0.0).to(tl.float32)
    maximum = largest_magnitude(first)
    for start in range(BLOCK, size, BLOCK):
        x = tl.load(x_pointer + start + column, mask=start + column < size, other=0.0).to(tl.float32)
        maximum = tl.maximum(maximum, largest_magnitude(x))
    finite = maximum < float("inf")
    maximum = tl.maximum(maximum, LEAST)
    inverse = tl.div_rn(LIMIT, maximum)
    tl.store(scales_pointer + row, tl.where(finite, tl.div_rn(maximum, LIMIT), float("nan")))
    kind: tl.constexpr = values_pointer.dtype.element_ty
    tl.store(values_pointers, quantised(first, inverse, finite, LIMIT, kind), mask=column < width)
    for start in range(BLOCK, width, BLOCK):
        x = tl.load(x_pointer + start + column, mask=start + column < size, other=0.0).to(tl.float32)
        values = quantised(x, inverse, finite, LIMIT, kind)
        tl.store(values_pointers + start, values, mask=start + column < width)


@triton.jit
def largest_magnitude(x):  # type: ignore[no-untyped-def]
    """Infinity if anything is not finite: NaN too, which a maximum on a GPU passes over."""
    magnitude = tl.abs(x)
    return tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def quantised(x, inverse, finite, LIMIT: tl.constexpr, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of a kind; the clamp keeps the compiler from fusing product and sum, which would round the two at once."""
    scaled = tl.clamp(tl.where(finite, x * inverse, 0.0), -LIMIT, LIMIT)
    if kind == tl.int8:
        scaled = (scaled + ROUNDING) - ROUNDING
    return scaled.to(kind)


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    weight_pointer,
    row_scales_pointer,
    channel_scales_pointer,
    bias_pointer,
    result_pointer,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of `x @ weight^T * row_scales * channel_scales + bias`; K and the strides are multiples of 16."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(program // tiles_n, program % tiles_n, tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
    rows, channels = M - tile_m * BLOCK_M, N - tile_n * BLOCK_N
    row_start, channel_start = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    row, channel, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows past the last read the last again, unmasked; what they make is not stored.
    x_row, weight_row = row_start + tl.minimum(row, rows - 1), channel_start + tl.minimum(channel, channels - 1)
    x_pointers = tl.multiple_of(x_pointer + (x_row * x_stride)[:, None] + k[None, :], (1, ALIGNED))
    weight_pointers = tl.multiple_of(weight_pointer + (weight_row * weight_stride)[None, :] + k[:, None], (ALIGNED, 1))
    integers: tl.constexpr = x_pointer.dtype.element_ty == tl.int8
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if integers else tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.multiple_of(K - start, ALIGNED)
        x = tl.load(x_pointers, mask=k[None, :] < left, other=0.0)
        weight = tl.load(weight_pointers, mask=k[:, None] < left, other=0.0)
        # Hopper's tensor cores sum fp8 in about 14 bits; each block's sum is added up in float32.
        imprecise: tl.constexpr = None if integers else BLOCK_K
        total = tl.dot(x, weight, total, max_num_imprecise_acc=imprecise, out_dtype=total.dtype)
        x_pointers += BLOCK_K
        weight_pointers += BLOCK_K
    row_scale = tl.load(row_scales_pointer + row_start + row, mask=row < rows, other=0.0)
    channel_scale = tl.load(channel_scales_pointer + channel_start + channel, mask=channel < channels, other=0.0)
    result = total.to(tl.float32) * row_scale[:, None] * channel_scale[None, :]
    if bias_pointer is not None:
        bias = tl.load(bias_pointer + channel_start + channel, mask=channel < channels, other=0.0)
        result += bias.to(tl.float32)[None, :]
    # int32 within the tile: half the registers for the addresses.
    pointers = result_pointer + row_start * N + channel_start + (row[:, None] * N + channel[None, :])
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    tl.store(pointers, result.to(result_pointer.dtype.element_ty), mask=inside)


def configurations(dtype: str) -> list[Configuration]:
    """How the kernels are launched for tensors of a dtype that Triton calls `fp32`, `fp16` or `bf16`.

    The longest block and the large tile take most registers, the first small tile fewest.
    """
    found = []
    kinds: list[tuple[Kind, str, int]] = [("int8", "*i8", 80), ("fp8", "*fp8e4nv", 89)]
    for kind, values, lowest in kinds:
        types = {"x_pointer": f"*{dtype}", "values_pointer": values, "scales_pointer": "*fp32"}
        types |= {"size": "i32", "stride": "i64"}
        constants = {"LIMIT": LIMITS[kind], "BLOCK": LONGEST_BLOCK}
        warps = warps_for(LONGEST_BLOCK)
        found.append(
            Configuration(f"quantise-{kind}", quantise_kernel, types, constants, warps, lowest_capability=lowest)
        )
        types = {"x_pointer": values, "weight_pointer": values, "row_scales_pointer": "*fp32"}
        types |= {"channel_scales_pointer": "*fp32", "bias_pointer": f"*{dtype}", "result_pointer": f"*{dtype}"}
        types |= dict.fromkeys(("M", "N", "K"), "i32") | dict.fromkeys(("x_stride", "weight_stride"), "i64")
        for tile in (SMALL_TILES[0], LARGE_TILE):
            name = f"product-{kind}-{tile.m}x{tile.n}"
            found.append(Configuration(name, product_kernel, types, _constants(tile), tile.warps, tile.stages, lowest))
    return found
