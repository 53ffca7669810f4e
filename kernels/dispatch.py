"""Which implementation an operation runs: Triton's on a GPU, the torch reference anywhere else."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton does the work: every tensor is on CUDA and no wider than float32, and triton is installed.

    Args:
        tensors: the operands that are computed with; None for one that is left out.
    """
    return _has_triton() and all(
        tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors if tensor is not None
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
