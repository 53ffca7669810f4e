"""RMSNorm and rotary embedding of queries and keys: the Triton kernels against the reference, and that itself."""

import pytest
import torch
from torch import Tensor

from fewstep.kernels.rotary import norm_rotary, norm_rotary_reference

from .gradients import gradients

# float32: another order of summation; halves: one rounding of the result, which the interpreter does by cutting off.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EPSILON = 1e-2


def operands(device: str, batch: int, length: int, heads: int, columns: int) -> list[Tensor]:
    """Query and key as views of a fused projection, their weights, and cosines and sines that pairs need not share."""
    query, key, _ = torch.randn(batch, length, 3 * heads * columns, device=device).chunk(3, dim=-1)
    shape = (heads, columns)
    angles = torch.randn(2, length, columns, device=device)
    return [query.unflatten(-1, shape), key.unflatten(-1, shape), *torch.randn(2, columns, device=device), *angles]


def launch(*arguments: Tensor | float | bool | None) -> tuple[Tensor, Tensor]:
    from fewstep.kernels.rotary_triton import launch

    return launch(*arguments)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs for the query and two for the key, which take several tokens at once, and more than once."""
    pytest.importorskip("triton")
    from fewstep.kernels import rotary_triton

    monkeypatch.setattr(rotary_triton, "PROGRAMS", 2)
    monkeypatch.setattr(rotary_triton, "NUMBERS", 128)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [2, 6, 32, 64, 72, 128, 1022])
def test_kernel_equals_the_reference_for_any_head(
    triton_device: str, columns: int, dtype: torch.dtype, interleaved: bool
) -> None:
    query, key, query_weight, key_weight, cos, sin = operands(triton_device, 1, 2, 3, columns)
    inputs = [*(value.to(dtype) for value in (query, key, query_weight, key_weight)), cos, sin]
    expected = norm_rotary_reference(*inputs, EPSILON, interleaved)
    for result, reference in zip(launch(*inputs, EPSILON, interleaved), expected, strict=True):
        assert result.dtype == dtype
        assert result.is_contiguous()
        torch.testing.assert_close(result, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("columns", [1, 3, 7, 1023])
def test_norm_alone_takes_odd_heads(triton_device: str, columns: int) -> None:
    query, key, query_weight, *_ = operands(triton_device, 1, 2, 3, columns)
    inputs = [value.detach().requires_grad_() for value in (query, key, query_weight)]
    results = launch(*inputs, None, None, None, EPSILON, False)
    expected = norm_rotary_reference(*inputs, None, None, None, EPSILON, False)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(results, inputs), gradients(expected, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("length", "heads", "columns"), [(1, 1, 2), (5, 3, 6), (3, 5, 72)])
def test_every_gradient_equals_float64(
    triton_device: str, few_programs: None, length: int, heads: int, columns: int, interleaved: bool
) -> None:
    *inputs, cos, sin = operands(triton_device, 2, length, heads, columns)
    inputs = [value.detach().requires_grad_() for value in inputs]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    results = launch(*inputs, cos, sin, EPSILON, interleaved)
    expected = norm_rotary_reference(*wide, cos.double(), sin.double(), EPSILON, interleaved)
    for found, reference in zip(gradients(results, inputs), gradients(expected, wide), strict=True):
        # The weights' gradients are sums over tokens and heads that cancel.
        bound = 2e-5 * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(found.double(), reference, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_halves_come_in_halves(triton_device: str, dtype: torch.dtype) -> None:
    *inputs, cos, sin = operands(triton_device, 1, 2, 3, 10)
    inputs = [value.detach().to(dtype).requires_grad_() for value in inputs]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    found = gradients(launch(*inputs, cos, sin, EPSILON, True), inputs)
    assert {gradient.dtype for gradient in found} == {dtype}
    expected = gradients(norm_rotary_reference(*wide, cos.double(), sin.double(), EPSILON, True), wide)
    for gradient, reference in zip(found, expected, strict=True):
        # The incoming gradient is rounded to halves too.
        bound = 2 * TOLERANCE[dtype] * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=bound)


def test_key_may_have_fewer_heads_and_without_rotation_another_length(triton_device: str) -> None:
    query, key = torch.randn(2, 3, 4, 8, device=triton_device), torch.randn(2, 3, 2, 8, device=triton_device)
    cos, sin = torch.randn(2, 3, 8, device=triton_device)
    expected = norm_rotary_reference(query, key, None, None, cos, sin, EPSILON, False)
    torch.testing.assert_close(launch(query, key, None, None, cos, sin, EPSILON, False), expected, rtol=1e-5, atol=1e-5)
    inputs = [value.requires_grad_() for value in (query, torch.randn(2, 5, 4, 8, device=triton_device))]
    results = launch(*inputs, None, None, None, None, EPSILON, True)
    expected = norm_rotary_reference(*inputs, None, None, None, None, EPSILON)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(results, inputs), gradients(expected, inputs), rtol=1e-4, atol=1e-5)


def test_kernel_and_its_backward_take_any_strides(triton_device: str) -> None:
    query = torch.randn(2, 3, 8, 4, device=triton_device).mT.requires_grad_()
    key = torch.randn(2, 4, 3, 8, device=triton_device).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 8, 3, device=triton_device).mT
    results = launch(query, key, None, None, cos, sin, EPSILON, True)
    expected = norm_rotary_reference(query, key, None, None, cos, sin, EPSILON, True)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
    # Attention hands back (B, H, N, D) tensors seen as (B, N, H, D), and a sum hands back one number for all.
    incoming = [torch.randn(2, 4, 3, 8, device=triton_device).transpose(1, 2), torch.ones((), device=triton_device)]
    incoming[1] = incoming[1].expand(2, 3, 4, 8)
    found = torch.autograd.grad(results, (query, key), incoming)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (query, key), incoming), rtol=1e-4, atol=1e-5)


def test_samples_are_found_beyond_two_to_the_31(triton_device: str) -> None:
    """The second sample lies 2^31 + 16 numbers on, in memory of which only the samples are touched."""
    stride, size = 2**31 + 16, 2 * 3 * 8
    reserved = torch.empty(stride + size, dtype=torch.float16, device=triton_device)
    query = reserved.as_strided((2, 2, 3, 8), (stride, 24, 8, 1))
    query.copy_(torch.randn(query.shape))
    expected = norm_rotary_reference(query, query, None, None, None, None, EPSILON)
    results = launch(query, query, None, None, None, None, EPSILON, True)
    torch.testing.assert_close(results, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_gives_nothing(triton_device: str, shape: tuple[int, int, int, int]) -> None:
    *inputs, cos, sin = operands(triton_device, *shape)
    inputs = [value.detach().requires_grad_() for value in inputs]
    results = launch(*inputs, cos, sin, EPSILON, True)
    assert [result.shape for result in results] == [shape, shape]
    torch.testing.assert_close(results, norm_rotary_reference(*inputs, cos, sin, EPSILON, True))
    for gradient, value in zip(gradients(results, inputs), inputs, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(value))


@pytest.mark.parametrize("interleaved", [True, False])
def test_reference_is_the_norm_and_the_rotation_of_diffusers(device: str, interleaved: bool) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    normalization = pytest.importorskip("diffusers.models.normalization")
    inputs = operands(device, 2, 3, 4, 8)
    results = norm_rotary(*inputs, epsilon=EPSILON, interleaved=interleaved)
    for x, weight, result in zip(inputs[:2], inputs[2:4], results, strict=True):
        norm = normalization.RMSNorm(8, eps=EPSILON).to(device)
        norm.load_state_dict({"weight": weight})
        expected = embeddings.apply_rotary_emb(
            norm(x), tuple(inputs[4:]), use_real_unbind_dim=-1 if interleaved else -2, sequence_dim=1
        )
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotation_keeps_lengths_and_sees_only_distances(device: str, interleaved: bool) -> None:
    length, columns = 6, 8
    frequencies = torch.rand(columns // 2, dtype=torch.float64, device=device)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies
    angle = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angle, angle), dim=-1)
    query, key = torch.randn(2, 1, 1, 1, columns, dtype=torch.float64, device=device).expand(2, 1, length, 1, columns)
    query, key = norm_rotary(query, key, None, None, angle.cos(), angle.sin(), 0.0, interleaved)
    torch.testing.assert_close(query.square().mean(-1), torch.ones_like(query[..., 0]))
    products = query[0, :, 0] @ key[0, :, 0].T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])


@pytest.mark.parametrize("interleaved", [True, False])
def test_gradients_of_the_reference_are_those_of_finite_differences(interleaved: bool) -> None:
    *inputs, cos, sin = (value.detach().double() for value in operands("cpu", 1, 2, 1, 4))
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(
        lambda *values: norm_rotary_reference(*values, cos, sin, EPSILON, interleaved), inputs
    )


def test_halves_are_computed_in_float32_and_rounded_once(device: str) -> None:
    inputs = [value.bfloat16() for value in operands(device, 2, 3, 4, 8)]
    wide = norm_rotary_reference(*(value.float() for value in inputs))
    for result, reference in zip(norm_rotary(*inputs), wide, strict=True):
        torch.testing.assert_close(result, reference.bfloat16(), rtol=0, atol=0)
