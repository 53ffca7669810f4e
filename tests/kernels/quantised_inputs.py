"""What the tests of the 8-bit linear layer go over, and how they compare."""

import torch
from torch import Tensor

from fewstep.kernels.quantised_linear import Kind

KINDS: list[Kind] = ["int8", "fp8"]
INPUTS = [torch.float32, torch.float16, torch.bfloat16]


def equal_bits(values: Tensor, expected: Tensor) -> bool:
    """Not a number is what it is, and zeros have a sign."""
    return values.dtype == expected.dtype and values.view(torch.uint8).equal(expected.view(torch.uint8))
