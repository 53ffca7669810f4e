"""Attention's output and tangent: its kernel against float64, finite differences and torch's own."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels.attention import (
    attention,
    attention_reference,
    attention_with_tangent,
    attention_with_tangent_reference,
)

from .attention_inputs import (
    LAYOUTS,
    TOLERANCE,
    assert_close,
    attend,
    attend_with_tangent,
    every_dtype,
    every_length,
    far_apart,
    inputs,
    packed,
    without_the_rest,
)

# torch.func.jvp imports a part of torch that warns of another.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def exact(*tensors: Tensor, **options: bool | Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and tangent by torch.func.jvp in float64."""
    wide = [tensor.double() for tensor in tensors]
    reference = partial(attention_reference, **options)
    out, d_out = torch.func.jvp(reference, tuple(wide[:3]), tuple(wide[3:]))
    return out, d_out


def assert_equal_to_float64(tensors: list[Tensor], **options: bool | Tensor | None) -> None:
    """Output alone, and output and tangent in one pass."""
    tolerance = TOLERANCE[tensors[0].dtype]
    expected, d_expected = exact(*tensors, **options)
    out, d_out = attend_with_tangent(*tensors, **options)
    assert out.dtype == d_out.dtype == tensors[0].dtype
    assert_close(out, expected, tolerance)
    assert_close(d_out, d_expected, tolerance)
    assert_close(attend(*tensors[:3], **options), expected, tolerance)


@pytest.mark.parametrize("head", [8, 64, 72, 128])
@every_dtype
def test_kernel_equals_float64_at_any_head_dimension(triton_device: str, head: int, dtype: torch.dtype) -> None:
    assert_equal_to_float64(inputs(triton_device, 5, 9, head, dtype, batch=1, heads=1))


@pytest.mark.parametrize("causal", [False, True])
@every_length
def test_kernel_equals_float64_at_any_length(triton_device: str, rows: int, keys: int, causal: bool) -> None:
    assert_equal_to_float64(inputs(triton_device, rows, keys, 16, batch=1, heads=1), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_equals_float64_beyond_the_tiles_of_halves(triton_device: str, causal: bool) -> None:
    assert_equal_to_float64(inputs(triton_device, 129, 130, 16, torch.float16, batch=1, heads=1), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@every_dtype
def test_keys_beyond_a_samples_length_are_never_read(triton_device: str, dtype: torch.dtype, causal: bool) -> None:
    lengths = torch.tensor([20, 17, 1, 0], dtype=torch.int32, device=triton_device)
    tensors = without_the_rest(inputs(triton_device, 7, 20, 16, dtype, batch=4, heads=1), lengths)
    assert_equal_to_float64(tensors, causal=causal, lengths=lengths)
    out, d_out = attend_with_tangent(*tensors, causal=causal, lengths=lengths)
    assert not out[3].any()
    assert not d_out[3].any()


@pytest.mark.parametrize("length", [-1, 0, 9, 1000])
def test_lengths_beyond_the_range_count_as_its_ends(triton_device: str, length: int) -> None:
    tensors = inputs(triton_device, 5, 9, 16)
    lengths = torch.full((2,), length, dtype=torch.int32, device=triton_device)
    expected = torch.zeros_like(tensors[0]) if length <= 0 else attend(*tensors[:3])
    torch.testing.assert_close(attend(*tensors[:3], lengths=lengths), expected)
    torch.testing.assert_close(attention_reference(*tensors[:3], lengths=lengths), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_takes_any_strides(triton_device: str, layout: str) -> None:
    tensors = LAYOUTS[layout](inputs(triton_device, 9, 9, 16))
    assert not all(tensor.is_contiguous() for tensor in tensors)
    assert_equal_to_float64(tensors)


def test_output_keeps_heads_inside_rows(triton_device: str) -> None:
    """So that a transformer's next linear layer reads it without a copy."""
    tensors = packed(inputs(triton_device, 9, 9, 16))
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in attend_with_tangent(*tensors))


def test_kernel_addresses_beyond_2_to_the_31(triton_device: str) -> None:
    far = far_apart(triton_device)
    near = [tensor.clone() for tensor in far]
    torch.testing.assert_close(attend(*far), attend(*near), rtol=0, atol=0)
    found, expected = attend_with_tangent(*far, *far), attend_with_tangent(*near, *near)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_attention_of_nothing(triton_device: str, batch: int, rows: int, keys: int) -> None:
    tensors = inputs(triton_device, rows, keys, 16, batch=batch)
    for value in (*attend_with_tangent(*tensors), *attention_with_tangent_reference(*tensors)):
        assert value.shape == tensors[0].shape
        assert not value.any()


@every_dtype
def test_large_scores_do_not_overflow(triton_device: str, dtype: torch.dtype) -> None:
    """Scores up to some 30,000, whose exponentials no format holds; their last bit in float32 is worth 2e-3."""
    query, key, value, d_query, d_key, d_value = inputs(triton_device, 9, 40, 16, dtype, batch=1)
    tensors = [60 * query, 60 * key, value, d_query / 60, d_key / 60, d_value]
    expected, d_expected = exact(*tensors)
    out, d_out = attend_with_tangent(*tensors)
    assert_close(out, expected, 4e-3 + TOLERANCE[dtype])
    assert_close(d_out, d_expected, 4e-3 + TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
def test_scale_is_that_of_torch(triton_device: str, scale: float) -> None:
    query, key, value = inputs(triton_device, 5, 17, 16)[:3]
    expected = scaled_dot_product_attention(query, key, value, scale=scale)
    torch.testing.assert_close(attend(query, key, value, scale=scale), expected)
    torch.testing.assert_close(attention_reference(query, key, value, scale=scale), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(9, 9), (5, 9), (9, 5)])
def test_attention_is_torchs(device: str, rows: int, keys: int, causal: bool) -> None:
    query, key, value = inputs(device, rows, keys, 20)[:3]  # 20 is no multiple of 8: the reference everywhere
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(attention(query, key, value, causal), expected)


@every_dtype
def test_kernel_is_torchs_attention(triton_device: str, dtype: torch.dtype) -> None:
    query, key, value = inputs(triton_device, 33, 33, 24, dtype, batch=1)[:3]
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(attend(query, key, value, causal=True), expected, TOLERANCE[dtype])


def test_tangent_is_the_limit_of_differences(device: str) -> None:
    """Central differences in float64, whose error is of the second order in the step."""
    tensors = [tensor.double() for tensor in inputs(device, 5, 7, 8)]
    lengths = torch.tensor([7, 4], dtype=torch.int32, device=device)
    step = 1e-5
    ahead, behind = (
        attention(
            *(primal + sign * step * d for primal, d in zip(tensors[:3], tensors[3:], strict=True)), True, 0.7, lengths
        )
        for sign in (1, -1)
    )
    out, d_out = attention_with_tangent(*tensors, True, 0.7, lengths)
    torch.testing.assert_close(d_out, (ahead - behind) / (2 * step), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(out, attention(*tensors[:3], True, 0.7, lengths))


@pytest.mark.parametrize("given", range(8))
def test_a_tangent_that_is_none_is_zero(triton_device: str, given: int) -> None:
    tensors = inputs(triton_device, 5, 17, 16, batch=1)
    tangents = [tangent if given >> place & 1 else None for place, tangent in enumerate(tensors[3:])]
    zeros = [torch.zeros_like(full) if some is None else full for some, full in zip(tangents, tensors[3:], strict=True)]
    out, d_out = attend_with_tangent(*tensors[:3], *tangents)
    expected, d_expected = exact(*tensors[:3], *zeros)
    assert_close(out, expected, TOLERANCE[torch.float32])
    assert_close(d_out, d_expected, TOLERANCE[torch.float32])


def test_dispatch_equals_the_reference(device: str) -> None:
    tensors = inputs(device, 5, 9, 16)
    lengths = torch.tensor([9, 2], dtype=torch.int32, device=device)
    found = attention_with_tangent(*tensors, causal=True, lengths=lengths)
    torch.testing.assert_close(found, attention_with_tangent_reference(*tensors, causal=True, lengths=lengths))
    torch.testing.assert_close(found[0], attention(*tensors[:3], causal=True, lengths=lengths))


def test_halves_are_computed_in_float32(device: str) -> None:
    """Scores of 16 * 100 * 100 = 160,000 are beyond float16."""
    query = torch.full((1, 1, 3, 16), 100.0, dtype=torch.float16, device=device)
    out = attention(query, query, query)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, query)


def test_what_does_not_fit_together_is_refused(device: str) -> None:
    query, key, value, d_query, *_ = inputs(device, 3, 5, 8)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    for wrong in (value[:, :1], value[:, :, :4], value[..., :4], value[:1], value[0]):
        with pytest.raises(ValueError, match=r"\(B, H, M, D\), not \(2, 2, 3, 8\)"):
            attention(query, key, wrong)
    with pytest.raises(ValueError, match="one dtype"):
        attention(query.half(), key, value)
    with pytest.raises(ValueError, match="a tangent has the shape and dtype"):
        attention_with_tangent(query, key, value, None, d_query)
    for wrong in (lengths[:1], lengths.long()):
        with pytest.raises(ValueError, match=r"lengths are \(2,\) int32"):
            attention(query, key, value, lengths=wrong)
