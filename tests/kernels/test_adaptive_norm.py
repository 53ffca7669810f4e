"""Adaptive norm and gated residual: the Triton kernels against the references, and the references themselves."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fewstep.kernels.adaptive_norm import (
    Kind,
    adaptive_norm,
    adaptive_norm_reference,
    gated_residual,
    gated_residual_norm,
    gated_residual_norm_reference,
    gated_residual_reference,
)

from .gradients import gradients

# float32: another order of summation; halves: one rounding of the result, which the interpreter does by cutting off,
# and one of the stream before it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
NAMES = ("residual", "branch", "gate", "scale", "shift", "weight", "bias")
KINDS: tuple[Kind, ...] = ("layer", "rms")


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs a sample of two, which go through several rows, and more than once."""
    pytest.importorskip("triton")
    from fewstep.kernels import adaptive_norm_triton

    monkeypatch.setattr(adaptive_norm_triton, "PROGRAMS", 4)


@pytest.fixture
def few_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 32 numbers are cut."""
    pytest.importorskip("triton")
    from fewstep.kernels import adaptive_norm_triton

    monkeypatch.setattr(adaptive_norm_triton, "LARGEST", 32)
    monkeypatch.setattr(adaptive_norm_triton, "PIECE", 16)
    monkeypatch.setitem(adaptive_norm_triton.WALK, "BLOCK", 32)


def operands(device: str, batch: int, rows: int, columns: int, by_row: bool = False) -> list[Tensor]:
    """In the order of `NAMES`; gate, scale and shift are chunks of one tensor, as blocks of DiT make them."""
    residual, branch = torch.randn(2, batch, rows, columns, device=device)
    chunks = torch.randn(batch, *([rows] if by_row else []), 3 * columns, device=device).chunk(3, dim=-1)
    weight, bias = torch.randn(2, columns, device=device)
    return [residual, branch, *chunks, weight, bias]


def launch(*arguments: Tensor | float | str | None) -> tuple[Tensor, Tensor]:
    from fewstep.kernels.adaptive_norm_autograd import launch

    return launch(*arguments)


def compare_gradients(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Sums over rows and columns cancel: errors are measured against the largest entry."""
    for name, gradient, reference in zip(NAMES, found, expected, strict=False):
        assert gradient.shape == reference.shape, name
        bound = 4 * TOLERANCE[dtype] * max(1.0, reference.abs().max().item() if reference.numel() else 0.0)
        torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [1, 3, 7, 1023, 1024])
def test_kernel_equals_the_reference_at_any_size(
    triton_device: str, columns: int, dtype: torch.dtype, kind: Kind
) -> None:
    inputs = [value.to(dtype) for value in operands(triton_device, 2, 3, columns)]
    results = launch(*inputs, 1e-2, kind)
    expected = gated_residual_norm_reference(*inputs, 1e-2, kind)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (11, 300)])
def test_every_gradient_equals_float64(
    triton_device: str, few_programs: None, rows: int, columns: int, by_row: bool, kind: Kind
) -> None:
    inputs = [value.requires_grad_() for value in operands(triton_device, 2, rows, columns, by_row)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    found = gradients(launch(*inputs, 1e-2, kind), inputs)
    compare_gradients(found, gradients(gated_residual_norm_reference(*wide, 1e-2, kind), wide), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_halves_come_in_halves(triton_device: str, dtype: torch.dtype) -> None:
    inputs = [value.to(dtype).requires_grad_() for value in operands(triton_device, 2, 3, 40)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    found = gradients(launch(*inputs, 1e-2, "layer"), inputs)
    assert {gradient.dtype for gradient in found} == {dtype}
    compare_gradients(found, gradients(gated_residual_norm_reference(*wide, 1e-2, "layer"), wide), dtype)


@pytest.mark.parametrize("present", [(), ("scale",), ("shift",), ("weight",), ("bias",), ("scale", "shift", "weight")])
def test_norm_alone_with_any_of_its_vectors(triton_device: str, present: tuple[str, ...]) -> None:
    named = dict(zip(NAMES, operands(triton_device, 2, 3, 9), strict=True))
    inputs = [named[name].requires_grad_() for name in ("residual", *present)]
    vectors = [named[name] if name in present else None for name in ("scale", "shift", "weight", "bias")]
    _, normed = launch(named["residual"], None, None, *vectors, 1e-2, "layer")
    expected = adaptive_norm_reference(named["residual"], *vectors, 1e-2, "layer")
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)
    for found, reference in zip(gradients([normed], inputs), gradients([expected], inputs), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_row", [False, True])
def test_residual_alone(triton_device: str, by_row: bool) -> None:
    inputs = [value.requires_grad_() for value in operands(triton_device, 2, 5, 9, by_row)[:3]]
    stream, normed = launch(*inputs)
    assert normed is None
    expected = gated_residual_reference(*inputs)
    torch.testing.assert_close(stream, expected)
    for found, reference in zip(gradients([stream], inputs), gradients([expected], inputs), strict=True):
        torch.testing.assert_close(found, reference)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_may_go_unused(triton_device: str, used: int) -> None:
    inputs = [value.requires_grad_() for value in operands(triton_device, 2, 3, 9)]
    reached = inputs[:3] if used == 0 else inputs
    found = gradients([launch(*inputs, 1e-2, "rms")[used]], reached)
    expected = gradients([gated_residual_norm_reference(*inputs, 1e-2, "rms")[used]], reached)
    compare_gradients(found, [gradient.double() for gradient in expected], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_row", [False, True])
def test_rows_longer_than_registers_are_cut(
    triton_device: str, few_programs: None, few_registers: None, by_row: bool, kind: Kind
) -> None:
    inputs = [value.requires_grad_() for value in operands(triton_device, 2, 3, 41, by_row)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    results, expected = launch(*inputs, 1e-2, kind), gated_residual_norm_reference(*wide, 1e-2, kind)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-5)
    compare_gradients(gradients(results, inputs), gradients(expected, wide), torch.float32)


@pytest.mark.parametrize(("columns", "used"), [(9, 2), (9, 1), (41, 2)])
def test_residual_without_a_gate_is_the_plain_sum(
    triton_device: str, few_programs: None, few_registers: None, columns: int, used: int
) -> None:
    """Rows that are held, of which both results or the stream are used, and rows that are cut."""
    inputs = [value.requires_grad_() for value in operands(triton_device, 2, 5, columns)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    del inputs[2], wide[2]
    results = launch(*inputs[:2], None, *inputs[2:], 1e-2, "layer")
    expected = gated_residual_norm_reference(*wide[:2], None, *wide[2:], 1e-2, "layer")
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-5)
    reached = 2 if used == 1 else len(inputs)
    found = gradients(results[:used], inputs[:reached])
    for gradient, reference in zip(found, gradients(expected[:used], wide[:reached]), strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-4)


def test_branch_without_a_gate_gets_its_gradient_if_nothing_else_needs_one(triton_device: str) -> None:
    residual, branch, *_ = operands(triton_device, 2, 3, 9)
    branch.requires_grad_()
    found = gradients(launch(residual, branch, None, None, None, None, None, 1e-2, "rms"), [branch])
    expected = gradients(gated_residual_norm_reference(residual, branch, epsilon=1e-2, kind="rms"), [branch])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scale_of_every_row_beside_a_shift_of_the_sample(triton_device: str) -> None:
    x, _, _, shift, *_ = operands(triton_device, 2, 5, 9)
    scale = torch.randn(2, 5, 9, device=triton_device)
    inputs = [value.detach().requires_grad_() for value in (x, scale, shift.unsqueeze(1))]
    (x, scale, shift) = inputs
    _, normed = launch(x, None, None, scale, shift, None, None, 1e-2, "layer")
    expected = adaptive_norm_reference(x, scale, shift, epsilon=1e-2)
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)
    for found, reference in zip(gradients([normed], inputs), gradients([expected], inputs), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)


def test_kernel_takes_any_strides(triton_device: str) -> None:
    x = torch.randn(2, 9, 5, device=triton_device).mT
    scale = torch.randn(9, 2, device=triton_device).T
    shift = torch.randn(2, 18, device=triton_device)[:, ::2]
    _, normed = launch(x, None, None, scale, shift, None, None, 1e-6, "layer")
    torch.testing.assert_close(normed, adaptive_norm_reference(x, scale, shift), rtol=1e-5, atol=1e-5)
    d_x = torch.autograd.grad(
        launch(x.requires_grad_(), None, None, scale, None, None, None, 1e-6, "rms")[1].mT,
        x,
        scale.new_ones(1).expand(2, 9, 5),
    )
    expected = torch.autograd.grad(adaptive_norm_reference(x, scale, kind="rms").sum(), x)
    torch.testing.assert_close(d_x, expected, rtol=1e-4, atol=1e-5)


def test_vectors_are_found_beyond_two_to_the_31(triton_device: str) -> None:
    """The second sample's vector lies 2^31 + 16 numbers on, in memory of which only the vectors are touched."""
    stride, columns = 2**31 + 16, 8
    reserved = torch.empty(stride + columns, dtype=torch.float16, device=triton_device)
    scale = reserved.as_strided((2, columns), (stride, 1))
    scale.copy_(torch.randn(2, columns))
    x = torch.randn(2, 3, columns, device=triton_device)
    _, normed = launch(x, None, None, scale, None, None, None, 1e-6, "layer")
    torch.testing.assert_close(normed, adaptive_norm_reference(x, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_gives_nothing(triton_device: str, shape: tuple[int, int, int]) -> None:
    inputs = [value.requires_grad_() for value in operands(triton_device, *shape)]
    results = launch(*inputs, 1e-6, "layer")
    assert [result.shape for result in results] == [shape, shape]
    torch.testing.assert_close(results, gated_residual_norm_reference(*inputs))
    for gradient, value in zip(gradients(results, inputs), inputs, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(value))


def test_kernel_gives_the_same_bits_twice(triton_device: str, few_programs: None) -> None:
    inputs = [value.requires_grad_() for value in operands(triton_device, 2, 11, 3)]
    first, second = (gradients(launch(*inputs, 1e-6, "layer"), inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_batch_one_has_two_programs_for_every_multiprocessor_of_an_h100() -> None:
    pytest.importorskip("triton")
    from fewstep.kernels.adaptive_norm_triton import PROGRAMS, backward_tile, forward_tile

    for rows, columns in ((1024, 1152), (4096, 1536), (4096, 3072), (264, 64)):
        assert -(-rows // forward_tile(1, rows, columns)["ROWS"]) >= PROGRAMS
        _, span = backward_tile(1, rows, columns)
        assert PROGRAMS // 2 < -(-rows // span) <= PROGRAMS


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_torchs_norm_then_the_modulation(device: str, kind: Kind) -> None:
    x, _, _, scale, shift, weight, bias = operands(device, 2, 3, 9)
    norm = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(9, eps=1e-3).to(device)
    norm.load_state_dict({"weight": weight, "bias": bias} if kind == "layer" else {"weight": weight})
    expected = (1 + scale[:, None]) * norm(x) + shift[:, None]
    result = adaptive_norm(x, scale, shift, weight, bias if kind == "layer" else None, 1e-3, kind)
    torch.testing.assert_close(result, expected)


def test_reference_is_the_norm_of_diffusers_transformers(device: str) -> None:
    normalization = pytest.importorskip("diffusers.models.normalization")
    module = normalization.AdaLayerNormZero(8).to(device)
    x, emb = torch.randn(2, 3, 8, device=device), torch.randn(2, 8, device=device)
    normed, gate, *_ = module(x, emb=emb)
    shift, scale, own_gate, *_ = module.linear(nn.functional.silu(emb)).chunk(6, dim=1)
    torch.testing.assert_close(adaptive_norm(x, scale, shift), normed)
    torch.testing.assert_close(gated_residual(x, normed, own_gate), x + gate[:, None] * normed)


def test_no_modulation_and_no_gate_change_nothing(device: str) -> None:
    x, branch, gate, *_ = operands(device, 2, 3, 9)
    zero = torch.zeros_like(gate)
    torch.testing.assert_close(adaptive_norm(x, zero, zero), nn.functional.layer_norm(x, (9,), eps=1e-6))
    assert torch.equal(gated_residual(x, branch, zero), x)
    ungated = gated_residual_norm(x, branch, epsilon=1e-6)
    torch.testing.assert_close(ungated, gated_residual_norm(x, branch, torch.ones_like(gate)))


def test_another_kind_of_norm_is_refused(device: str) -> None:
    x = torch.zeros(1, 1, 4, device=device)
    with pytest.raises(ValueError, match="one of layer, rms, not RMS"):
        adaptive_norm(x, kind="RMS")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of layer, rms, not batch"):
        gated_residual_norm(x, x, kind="batch")  # type: ignore[arg-type]


def test_halves_are_computed_in_float32_and_rounded_once(device: str) -> None:
    """The squares of 60,000 are beyond float16; the norm of the row is not."""
    x = torch.tensor([[[60_000.0, -60_000.0]]], device=device, dtype=torch.float16)
    torch.testing.assert_close(adaptive_norm_reference(x), torch.tensor([[[1.0, -1.0]]], device=device).half())
    inputs = [value.bfloat16() for value in operands(device, 2, 3, 9)]
    stream, normed = gated_residual_norm(*inputs)
    wide = [value.float() for value in inputs]
    torch.testing.assert_close(stream, gated_residual_reference(*wide[:3]).bfloat16(), rtol=0, atol=0)
    # Of the rounded stream: a fused pass and two passes agree.
    expected = adaptive_norm_reference(stream.float(), *wide[3:]).bfloat16()
    torch.testing.assert_close(normed, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_are_those_of_finite_differences(kind: Kind) -> None:
    inputs = [value.double().requires_grad_() for value in operands("cpu", 2, 2, 3)]
    assert torch.autograd.gradcheck(lambda *values: gated_residual_norm_reference(*values, 1e-2, kind), inputs)
