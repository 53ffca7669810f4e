"""Tensors for attention, its kernels by the names of the public functions, and how close they come to float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# float32: another order of summation. float16: besides the result, the weights and their tangents (up to a few units)
# are rounded before they are multiplied; gradients round twice. bfloat16 has 3 bits less, and runs on a GPU only.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}
on_gpu_only = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Triton's interpreter multiplies bfloat16 wrongly"
)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu_only)], ids=str
)
every_length = pytest.mark.parametrize(("rows", "keys"), [(1, 1), (7, 3), (17, 33), (33, 17), (32, 16)])
Attend = Callable[..., Tensor]


def inputs(
    device: str, rows: int, keys: int, head: int, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 2
) -> list[Tensor]:
    """Query, key, value, and as many tangents."""
    sizes = [rows, keys, keys] * 2
    return [torch.randn(batch, heads, size, head, device=device).to(dtype) for size in sizes]


def without_the_rest(tensors: list[Tensor], lengths: Tensor) -> list[Tensor]:
    """Keys, values and their tangents are NaN beyond a sample's length: whoever reads them shows it."""
    for tensor in (*tensors[1:3], *tensors[4:]):
        for sample, length in enumerate(lengths.tolist()):
            tensor[sample, :, length:] = float("nan")
    return tensors


def packed(tensors: list[Tensor]) -> list[Tensor]:
    """Heads inside rows, and query, key and value inside those: what one linear layer gives."""
    stacked = [torch.stack(tensors[begin : begin + 3], 3).transpose(1, 2).contiguous() for begin in (0, 3)]
    return [tensor.transpose(1, 2) for together in stacked for tensor in together.unbind(3)]


LAYOUTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "packed": packed,
    "columns first": lambda tensors: [tensor.mT.contiguous().mT for tensor in tensors],
    "batch last": lambda tensors: [tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for tensor in tensors],
    "expanded": lambda tensors: [tensor[:1, :1].expand_as(tensor) for tensor in tensors],
    "off 16 bytes": lambda tensors: [torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2] for tensor in tensors],
    "tangents apart": lambda tensors: [*packed(tensors)[:3], *tensors[3:]],
}


def far_apart(device: str) -> list[Tensor]:
    """Query, key and value whose rows are 2^31 numbers apart; only what is used ever gets memory on a CPU."""
    storage = torch.empty(2**31 + 48, dtype=torch.float16, device=device)
    tensors = [storage.as_strided((1, 1, 2, 16), (0, 0, 2**31, 1), 16 * place) for place in range(3)]
    return [tensor.copy_(torch.randn(tensor.shape)) for tensor in tensors]


def attend(*tensors: Tensor, causal: bool = False, scale: float | None = None, lengths: Tensor | None = None) -> Tensor:
    """What `attention` is on a GPU, here by the interpreter."""
    from fewstep.kernels.attention_autograd import attend

    query, key, value = tensors
    return attend(query, key, value, causal, scale, lengths)


def attend_with_tangent(
    *tensors: Tensor | None, causal: bool = False, scale: float | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `attention_with_tangent` is there."""
    from fewstep.kernels.attention_autograd import attend_with_tangent

    return attend_with_tangent(*tensors, causal, scale, lengths)


def gradients(function: Attend, tensors: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    """Of query, key and value, along a gradient of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, direction)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """To within a fraction of the largest number, and of 1: what is summed is that large, even where the sum is not."""
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=tolerance, atol=tolerance * largest)
