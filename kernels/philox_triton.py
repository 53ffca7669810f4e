"""Triton source of the counter-based noise; imported on CUDA only."""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from .compilation import Configuration

BLOCK = 512
"""Numbers a program: at four warps each thread makes one group of four, which it stores at once."""


def launch(seeds: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """Write every number once."""
    noise = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    if noise.numel():
        size = math.prod(shape)
        chunks = triton.cdiv(size, BLOCK)
        # Triton launches on the current device, wherever the pointers lead.
        with torch.cuda.device_of(seeds):  # type: ignore[no-untyped-call]
            kernel[(len(seeds) * chunks,)](seeds.contiguous(), noise, step, size, chunks, BLOCK=BLOCK)
    return noise


# One build for every step: 1 would get its own.
@triton.jit(do_not_specialize=["step"])  # type: ignore[untyped-decorator]
def kernel(seeds_pointer, noise_pointer, step, size, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Chunk `program_id % chunks` of the sample `program_id // chunks`."""
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    column = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = standard_normal(tl.load(seeds_pointer + sample), step, chunk, BLOCK)
    tl.store(noise_pointer + sample.to(tl.int64) * size + column, noise, mask=column < size)


@triton.jit  # type: ignore[untyped-decorator]
def standard_normal(seed, step, chunk, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers `chunk * BLOCK` and on of a seed's draw, float32; the kernels that need noise in registers call it."""
    element = chunk.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    draw = tl.zeros_like(low) + step.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, draw, tl.zeros_like(low))
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _box_muller(first, second):  # type: ignore[no-untyped-def]
    """Two normal numbers of two words. In float64 every GPU and CPU agrees on the float32 that it is rounded to."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * 2.0**-32))
    angle = 6.283185307179586 * ((second.to(tl.float64) + 0.5) * 2.0**-32)
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


def configurations(dtype: str) -> list[Configuration]:
    """How `launch` compiles the kernel; the noise is float32 whatever the dtype."""
    types = {"seeds_pointer": "*i64", "noise_pointer": "*fp32", "step": "i32", "size": "i32", "chunks": "i32"}
    return [Configuration("noise", kernel, types, {"BLOCK": BLOCK})]
