"""Gated linear units: the Triton kernels against the torch reference, and the reference itself."""

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fewstep.kernels.gated_linear_unit import Activation, gated_linear_unit, gated_linear_unit_reference

ACTIVATIONS = get_args(Activation)
# float32: a few roundings, and the GPU's exp of 2 ulp; halves: one rounding of the result (float16 2**-11, bfloat16
# 2**-8), twice that in the interpreter, which cuts bfloat16 off.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def launch(x: Tensor, activation: Activation = "gelu", dim: int = -1) -> Tensor:
    from fewstep.kernels.gated_linear_unit_triton import launch

    return launch(x, activation, dim)


def check(x: Tensor, activation: Activation, dim: int) -> None:
    """Result and gradient against the reference in float64."""
    wide = x.detach().double().requires_grad_()
    expected = gated_linear_unit_reference(wide, activation, dim)
    upstream = torch.randn(expected.shape, device=x.device).to(x.dtype)
    expected.backward(upstream.double())
    x = x.detach().requires_grad_()
    result = launch(x, activation, dim)
    result.backward(upstream)
    assert result.dtype == x.dtype
    assert wide.grad is not None
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, wide.grad.to(x.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 6), (7, 14), (3, 2046), (2, 5, 512), (9, 514), (1, 4098)])
def test_kernel_equals_the_reference_at_any_size(
    triton_device: str, shape: tuple[int, ...], activation: Activation, dtype: torch.dtype
) -> None:
    check(torch.randn(shape, device=triton_device).to(dtype), activation, -1)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kernel_halves_any_dimension_and_keeps_the_layout(
    triton_device: str, memory_format: torch.memory_format, dim: int
) -> None:
    x = torch.randn(4, 6, 2, 10, device=triton_device).to(memory_format=memory_format)
    check(x, "silu", dim)
    assert launch(x, "silu", dim).is_contiguous(memory_format=memory_format)


def test_kernel_takes_any_strides(triton_device: str) -> None:
    x = torch.randn(3, 8, 10, device=triton_device)
    for strided in (x[:, ::2], x[..., 1:9], x.mT, x[:1].expand(3, -1, -1)):
        assert not strided.is_contiguous()
        check(strided, "gelu", -1)
        check(strided, "gelu", 1)


def test_kernel_takes_a_gradient_of_any_strides(triton_device: str) -> None:
    """The gradient of a sum is a single number, expanded."""
    x = torch.randn(3, 10, device=triton_device, requires_grad=True)
    (found,) = torch.autograd.grad(launch(x).sum(), x)
    (expected,) = torch.autograd.grad(gated_linear_unit_reference(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_kernel_addresses_in_int64(triton_device: str) -> None:
    """Row 16 of halves of 2**26 begins at number 2**31; of that memory only the rows' beginnings are ever touched."""
    from fewstep.kernels.gated_linear_unit_triton import forward_kernel

    half, rows, columns = 2**26, 17, 4
    x = torch.empty(rows, 2, half, dtype=torch.float16, device=triton_device)
    result = torch.empty(rows, half, dtype=torch.float16, device=triton_device)
    start = torch.randn(rows, 2, columns).to(x)
    x[..., :columns] = start
    forward_kernel[(1,)](x, result, rows, half, ACTIVATION="silu", ROWS=32, COLUMNS=columns)
    expected = gated_linear_unit_reference(start.flatten(1), "silu")
    torch.testing.assert_close(result[:, :columns], expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_nothing_gives_nothing(device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    result = gated_linear_unit(x)
    result.sum().backward()
    assert result.shape == (*shape[:-1], shape[-1] // 2)
    assert x.grad is not None
    assert x.grad.shape == shape


def test_an_odd_size_has_no_halves(device: str) -> None:
    with pytest.raises(ValueError, match="halves dimension 1: its size must be even, not 3"):
        gated_linear_unit(torch.zeros(2, 3, device=device), dim=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_has_exact_gradients(activation: Activation) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: gated_linear_unit_reference(value, activation, dim=1), x)


def test_gelu_is_the_feed_forward_of_diffusers() -> None:
    from diffusers.models.activations import GEGLU, SwiGLU

    x = torch.randn(2, 5, 8)
    for unit, activation in ((GEGLU(8, 6), "gelu"), (SwiGLU(8, 6), "silu")):
        torch.testing.assert_close(gated_linear_unit(unit.proj(x), activation), unit(x))


def test_silu_along_the_channels_is_the_gate_of_sana() -> None:
    x = torch.randn(2, 6, 4, 4)
    value, gate = x.chunk(2, dim=1)
    torch.testing.assert_close(gated_linear_unit(x, "silu", dim=1), value * functional.silu(gate))


def test_halves_are_computed_in_float32(device: str) -> None:
    """The activation is not rounded to float16 before the product, which changes more of the results."""
    x = torch.randn(2, 64, device=device).half()
    exact = gated_linear_unit_reference(x.double()).half()
    value, gate = x.chunk(2, dim=-1)
    assert (gated_linear_unit(x) != exact).sum() < (value * functional.gelu(gate) != exact).sum()
