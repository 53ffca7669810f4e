"""Triton source of a sampler's step; imported on CUDA only."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from .compilation import Configuration
from .philox_triton import standard_normal
from .sampler_step import Coefficients

BLOCK = 512
"""Numbers a program: at four warps each thread draws one group of four, and an SDXL latent makes 128 programs."""


def launch(x_t: Tensor, output: Tensor, coefficients: Coefficients, seeds: Tensor | None, step: int) -> Tensor:
    """Read each tensor once and write once; the noise never meets memory."""
    x_s = torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device)
    if x_s.numel():
        batch, size = len(x_t), x_t[0].numel()
        chunks = triton.cdiv(size, BLOCK)
        output = output.contiguous()
        unconditional = output[:batch] if coefficients.unconditional else None
        drawn = seeds.contiguous() if seeds is not None and coefficients.noise else None
        tensors = (x_t.contiguous(), output[-batch:], unconditional, drawn, x_s)
        weights = (coefficients.x_t, coefficients.conditional, coefficients.unconditional, coefficients.noise)
        # Triton launches on the current device, wherever the pointers lead.
        with torch.cuda.device_of(x_t):  # type: ignore[no-untyped-call]
            kernel[(batch * chunks,)](*tensors, *weights, step, size, chunks, BLOCK=BLOCK)
    return x_s


# One build for every draw: 1 would get its own.
@triton.jit(do_not_specialize=["step"])  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]
    x_t_pointer,
    conditional_pointer,
    unconditional_pointer,
    seeds_pointer,
    x_s_pointer,
    x_t_weight,
    conditional_weight,
    unconditional_weight,
    noise_weight,
    step,
    size,
    chunks,
    BLOCK: tl.constexpr,
):
    """Chunk `program_id % chunks` of the sample `program_id // chunks`; a pointer that is None leaves out its term."""
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    column = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    place = sample.to(tl.int64) * size + column
    x_s = x_t_weight * tl.load(x_t_pointer + place, mask=mask).to(tl.float32)
    x_s += conditional_weight * tl.load(conditional_pointer + place, mask=mask).to(tl.float32)
    if unconditional_pointer is not None:
        x_s += unconditional_weight * tl.load(unconditional_pointer + place, mask=mask).to(tl.float32)
    if seeds_pointer is not None:
        x_s += noise_weight * standard_normal(tl.load(seeds_pointer + sample), step, chunk, BLOCK)
    tl.store(x_s_pointer + place, x_s.to(x_s_pointer.dtype.element_ty), mask=mask)


def configurations(dtype: str) -> list[Configuration]:
    """How `launch` compiles the kernel for samples and outputs of a dtype: with the fewest and with all terms."""
    pointers = dict.fromkeys(("x_t_pointer", "conditional_pointer", "x_s_pointer"), f"*{dtype}")
    weights = dict.fromkeys(("x_t_weight", "conditional_weight", "unconditional_weight", "noise_weight"), "fp32")
    types = {**pointers, **weights, **dict.fromkeys(("step", "size", "chunks"), "i32")}
    optional = {"unconditional_pointer": f"*{dtype}", "seeds_pointer": "*i64"}
    return [
        Configuration("ddim", kernel, types, {**dict.fromkeys(optional), "BLOCK": BLOCK}),
        Configuration("guided-consistency", kernel, {**types, **optional}, {"BLOCK": BLOCK}),
    ]
