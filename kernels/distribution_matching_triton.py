"""Triton source of the distribution-matching gradient; imported on CUDA only.

A sample that fits in one program's registers is read once. A larger one is split over programs, or a small batch of
large latents would leave most of a GPU idle: one launch sums the distances of each chunk, a second adds these few
partial sums up and writes the gradient.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from .compilation import Configuration

MOST_IN_REGISTERS = 16_384
"""Numbers of a sample: an SD1.5 latent; 16 warps then hold 32 a thread of each tensor."""
LEAST_IN_CHUNK, MOST_IN_CHUNK = 512, 4096
"""Numbers that a program holds of a sample that several share: 128 programs for an SDXL latent."""
CHUNKS = 256
"""Most chunks of a sample: enough to fill a GPU alone, few enough for each program to add up their partial sums."""


def launch(x: Tensor, mu_fake: Tensor, mu_real: Tensor) -> Tensor:
    """Read each tensor once where a sample fits in registers; else read `mu_real` a second time."""
    gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if gradient.numel():
        x, mu_fake, mu_real = x.contiguous(), mu_fake.contiguous(), mu_real.contiguous()
        # Triton launches on the current device, wherever the pointers lead.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            if gradient[0].numel() <= MOST_IN_REGISTERS:
                _launch_whole(x, mu_fake, mu_real, gradient)
            else:
                _launch_chunks(x, mu_fake, mu_real, gradient)
    return gradient


def _launch_whole(x: Tensor, mu_fake: Tensor, mu_real: Tensor, gradient: Tensor) -> None:
    size = x[0].numel()
    block = triton.next_power_of_2(size)
    whole[(len(x),)](x, mu_fake, mu_real, gradient, size, BLOCK=block, num_warps=_warps(block))


def _launch_chunks(x: Tensor, mu_fake: Tensor, mu_real: Tensor, gradient: Tensor) -> None:
    size = x[0].numel()
    block, chunk = chunk_sizes(size)
    chunks = triton.cdiv(size, chunk)
    partial = torch.empty(len(x), chunks, dtype=torch.float32, device=x.device)
    sizes, constants = (size, chunk, chunks), {"BLOCK": block, "num_warps": _warps(block)}
    sum_chunk[(len(x) * chunks,)](x, mu_real, partial, *sizes, **constants)
    write_chunk[(len(x) * chunks,)](mu_fake, mu_real, partial, gradient, *sizes, CHUNKS=CHUNKS, **constants)


def chunk_sizes(size: int) -> tuple[int, int]:
    """Numbers a program holds at once, and those it goes through, at most `CHUNKS` times for a sample of `size`."""
    share = triton.cdiv(size, CHUNKS)
    block = min(max(triton.next_power_of_2(share), LEAST_IN_CHUNK), MOST_IN_CHUNK)
    return block, triton.cdiv(share, block) * block


def _warps(block: int) -> int:
    """Four numbers a thread, which it loads at once, as long as 16 warps are enough."""
    return min(max(block // 128, 1), 16)


@triton.jit  # type: ignore[untyped-decorator]
def whole(x_pointer, mu_fake_pointer, mu_real_pointer, gradient_pointer, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of sample `program_id`, whose `size` numbers are contiguous; sums and quotients are float32."""
    column = tl.arange(0, BLOCK)
    mask = column < size
    place = tl.program_id(0).to(tl.int64) * size + column
    x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
    mu_real = tl.load(mu_real_pointer + place, mask=mask, other=0.0).to(tl.float32)
    mu_fake = tl.load(mu_fake_pointer + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.sum(tl.abs(x - mu_real), axis=0) / size
    _store(gradient_pointer + place, (mu_fake - mu_real) / scale, mask)


@triton.jit  # type: ignore[untyped-decorator]
def sum_chunk(x_pointer, mu_real_pointer, partial_pointer, size, chunk, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of distances in chunk `program_id % chunks` of the sample `program_id // chunks`."""
    program = tl.program_id(0)
    first = (program % chunks).to(tl.int64) * chunk
    start = (program // chunks).to(tl.int64) * size
    total = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, chunk, BLOCK):
        column = first + offset + tl.arange(0, BLOCK)
        mask = column < size
        x = tl.load(x_pointer + start + column, mask=mask, other=0.0).to(tl.float32)
        mu_real = tl.load(mu_real_pointer + start + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.abs(x - mu_real)
    tl.store(partial_pointer + program, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def write_chunk(  # type: ignore[no-untyped-def]
    mu_fake_pointer,
    mu_real_pointer,
    partial_pointer,
    gradient_pointer,
    size,
    chunk,
    chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the same chunk; `CHUNKS` partial sums at most."""
    sample, part = tl.program_id(0) // chunks, tl.arange(0, CHUNKS)
    partial = tl.load(partial_pointer + sample.to(tl.int64) * chunks + part, mask=part < chunks, other=0.0)
    scale = tl.sum(partial, axis=0) / size
    first = (tl.program_id(0) % chunks).to(tl.int64) * chunk
    for offset in range(0, chunk, BLOCK):
        column = first + offset + tl.arange(0, BLOCK)
        mask = column < size
        place = sample.to(tl.int64) * size + column
        mu_fake = tl.load(mu_fake_pointer + place, mask=mask, other=0.0).to(tl.float32)
        mu_real = tl.load(mu_real_pointer + place, mask=mask, other=0.0).to(tl.float32)
        _store(gradient_pointer + place, (mu_fake - mu_real) / scale, mask)


@triton.jit
def _store(pointers, gradient, mask):  # type: ignore[no-untyped-def]
    """Store in the gradient's dtype; what is not finite, NaN too, as 0. Checked after the cast, which may overflow."""
    gradient = gradient.to(pointers.dtype.element_ty)
    finite = tl.abs(gradient.to(tl.float32)) < float("inf")
    tl.store(pointers, tl.where(finite, gradient, 0.0), mask=mask)


def configurations(dtype: str) -> list[Configuration]:
    """How `launch` compiles the kernels for tensors of a dtype, at the most numbers that a program holds."""
    x, mu_fake, mu_real, gradient = (
        {f"{name}_pointer": f"*{dtype}"} for name in ("x", "mu_fake", "mu_real", "gradient")
    )
    split = {"partial_pointer": "*fp32", **dict.fromkeys(("size", "chunk", "chunks"), "i32")}
    launches: list[tuple[Any, dict[str, str], dict[str, int]]] = [
        (whole, x | mu_fake | mu_real | gradient | {"size": "i32"}, {"BLOCK": MOST_IN_REGISTERS}),
        (sum_chunk, x | mu_real | split, {"BLOCK": MOST_IN_CHUNK}),
        (write_chunk, mu_fake | mu_real | gradient | split, {"BLOCK": MOST_IN_CHUNK, "CHUNKS": CHUNKS}),
    ]
    return [
        Configuration(kernel.__name__, kernel, types, constants, _warps(constants["BLOCK"]))
        for kernel, types, constants in launches
    ]
