"""Which implementation an operation runs: Triton's on a GPU, the torch reference anywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = find_spec("triton") is not None
_allowed = True
_everywhere = False


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton does the work: every tensor is on CUDA and no wider than float32, and triton is installed.

    In forward-mode differentiation (`torch.func.jvp`), which kernels do not have, the reference does it.

    Args:
        tensors: the operands that are computed with; None for one that is left out.
    """
    # Private, but there is no public word for it, and without it autograd stops at the kernels.
    return (
        HAS_TRITON
        and _allowed
        and all(suits_triton(tensor) for tensor in tensors if tensor is not None)
        and forward_ad._current_level < 0
    )


def suits_triton(tensor: Tensor) -> bool:
    """Whether a kernel can read a tensor."""
    return tensor.is_cuda and tensor.dtype != torch.float64


@contextmanager
def without_kernels() -> Iterator[None]:
    """Every operation is its reference for as long as this lasts, in all threads: what kernels are compared with."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@contextmanager
def fused_everywhere() -> Iterator[None]:
    """Layers that `apply` has patched run their fused forwards on any device for as long as this lasts, in all threads.

    An exporter then sees their operators on a CPU, too, where the references do the work.
    """
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


def runs_fused(operand: Tensor) -> bool:
    """Whether a layer that `apply` has patched runs its fused forward, given its first tensor."""
    return _everywhere or runs_triton(operand)
