"""Triton source of the distribution-matching gradient; imported on CUDA only."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from .compilation import Configuration

BLOCK = 2048


def launch(x: Tensor, mu_fake: Tensor, mu_real: Tensor) -> Tensor:
    """One program a sample: it reads the sample twice, first for the scale, then for the gradient."""
    gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if gradient.numel():
        size = gradient[0].numel()
        # Triton launches on the current device, wherever the pointers lead.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernel[(len(x),)](x.contiguous(), mu_fake.contiguous(), mu_real.contiguous(), gradient, size, BLOCK=BLOCK)
    return gradient


@triton.jit  # type: ignore[untyped-decorator]
def kernel(x_pointer, mu_fake_pointer, mu_real_pointer, gradient_pointer, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of sample `program_id`, whose `size` numbers are contiguous; sums and quotients are float32."""
    start = tl.program_id(0).to(tl.int64) * size
    total = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, size, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + start + column, mask=column < size, other=0.0).to(tl.float32)
        mu_real = tl.load(mu_real_pointer + start + column, mask=column < size, other=0.0).to(tl.float32)
        total += tl.abs(x - mu_real)
    scale = tl.sum(total, axis=0) / size
    for offset in range(0, size, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        mu_fake = tl.load(mu_fake_pointer + start + column, mask=column < size, other=0.0).to(tl.float32)
        mu_real = tl.load(mu_real_pointer + start + column, mask=column < size, other=0.0).to(tl.float32)
        gradient = ((mu_fake - mu_real) / scale).to(gradient_pointer.dtype.element_ty)
        # False for NaN too; checked after the cast, which may overflow.
        finite = tl.abs(gradient.to(tl.float32)) < float("inf")
        tl.store(gradient_pointer + start + column, tl.where(finite, gradient, 0.0), mask=column < size)


def configurations(dtype: str) -> list[Configuration]:
    """How `launch` compiles the kernel for tensors of a dtype that Triton calls `fp32`, `fp16` or `bf16`."""
    pointers = dict.fromkeys(("x_pointer", "mu_fake_pointer", "mu_real_pointer", "gradient_pointer"), f"*{dtype}")
    return [Configuration("gradient", kernel, {**pointers, "size": "i32"}, {"BLOCK": BLOCK})]
