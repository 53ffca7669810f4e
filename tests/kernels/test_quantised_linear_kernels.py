"""The 8-bit linear layer's Triton kernels against its reference.

Triton's interpreter multiplies int8 exactly, so the kernels equal the reference to the bit. It also reads and
multiplies every finite fp8 value exactly, but takes NaN for 480, and its cast from float32 to fp8 is not the GPU's: it
rounds ties up and loses the carry into the exponent. There, the kernel that quantises is tested on numbers that fp8
holds, which any cast leaves alone; the rounding is tested on the reference, with which a GPU's is compared.
"""

import numpy
import pytest
import torch
from torch import Tensor

from fewstep.kernels.quantised_linear import (
    DTYPES,
    LIMITS,
    Kind,
    QuantisedWeight,
    quantise_rows_reference,
    quantise_weight,
    quantised_linear_reference,
)

from .quantised_inputs import INPUTS, KINDS, equal_bits

# float32: a sum may be fused with the product before it; halves: the result's rounding, which bfloat16's in the
# interpreter does by cutting off.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


def held_by(kind: Kind, *shape: int, device: str = "cpu") -> Tensor:
    """Numbers that the kind holds, the largest of each row at its limit: quantising changes none of them."""
    x = (torch.randn(shape, device=device) * LIMITS[kind] / 4).clamp(-LIMITS[kind], LIMITS[kind])
    x[..., -1] = LIMITS[kind]
    return (x.round() if kind == "int8" else x).to(DTYPES[kind]).float()


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("size", [1, 3, 7, 1023, 2048])
def test_kernel_quantises_rows_to_the_bit(triton_device: str, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, size, device=triton_device).to(dtype)
    check_rows(x, "int8")
    if triton_device == "cuda":
        check_rows(x, "fp8")


@pytest.mark.parametrize("size", [1, 3, 7, 1023, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_keeps_numbers_that_the_kind_holds(triton_device: str, kind: Kind, size: int) -> None:
    check_rows(held_by(kind, 3, size, device=triton_device), kind)


def test_kernel_reads_rows_longer_than_a_block_twice(triton_device: str) -> None:
    from fewstep.kernels.quantised_linear_triton import LONGEST_BLOCK

    x = torch.randn(3, 2 * LONGEST_BLOCK + 5, device=triton_device)
    x[0, -1], x[1, -1] = 99.0, torch.nan
    check_rows(x, "int8")


def test_kernel_gives_zeros_and_nan_where_the_reference_does(triton_device: str) -> None:
    x = torch.randn(5, 20, device=triton_device)
    x[0], x[1, 2], x[2, 3], x[3] = 0.0, torch.nan, -torch.inf, 1e-38
    for kind in KINDS:
        check_rows(x[:4], kind)
    check_rows(x, "int8")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_kernel_quantises_nothing(triton_device: str, shape: tuple[int, int]) -> None:
    check_rows(torch.zeros(shape, device=triton_device), "int8")


def test_kernel_takes_rows_with_strides(triton_device: str) -> None:
    x = torch.randn(6, 40, device=triton_device)
    for strided in (x[::2], x[:, 3:20], x.T, x[:, ::3]):
        assert not strided.is_contiguous()
        check_rows(strided, "int8")


def test_addresses_of_rows_go_beyond_two_to_the_31(triton_device: str) -> None:
    """The second row lies 2^31 elements after the first, in memory that exists only where it is touched."""
    stride = 2**31
    memory = torch.empty(stride + 48, dtype=torch.int8, device=triton_device)
    far = memory.as_strided((2, 48), (stride, 1))
    far.copy_(torch.randint(-127, 128, (2, 48)))
    ones = torch.ones(2, device=triton_device)
    expected = (far.double() @ far.double().T).float()
    assert product(far, ones, far, ones).equal(expected)
    del memory, far
    x = torch.empty(stride + 9, dtype=torch.float16, device=triton_device).as_strided((2, 9), (stride, 1))
    check_rows(x.copy_(torch.randn(2, 9)), "int8")


def check_rows(x: Tensor, kind: Kind) -> None:
    """The kernel gives the reference's values and scales to the bit, and zeros up to a multiple of 16 columns."""
    from fewstep.kernels.quantised_linear_triton import launch_quantise_rows

    with numpy.errstate(all="ignore"):  # the interpreter computes with numpy
        values, scales = launch_quantise_rows(x, kind)
    expected_values, expected_scales = quantise_rows_reference(x, kind)
    assert equal_bits(values[:, : x.shape[1]].contiguous(), expected_values)
    assert not values[:, x.shape[1] :].float().any()
    assert -(-x.shape[1] // 16) * 16 == values.shape[1]
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)


def product(x: Tensor, row_scales: Tensor, weight: Tensor, channel_scales: Tensor) -> Tensor:
    from fewstep.kernels.quantised_linear_triton import launch_product

    return launch_product(x, row_scales, weight, channel_scales, None, torch.float32)


@pytest.mark.parametrize(("rows", "channels", "size"), [(1, 1, 2**16), (3, 7, 1024), (64, 65, 160), (257, 130, 16)])
def test_kernel_sums_int8_exactly(triton_device: str, rows: int, channels: int, size: int) -> None:
    """Unscaled, the float32 result is the integer sum rounded once; 2^16 products of 127 and 127 fit in int32."""
    x = torch.randint(-127, 128, (rows, size), dtype=torch.int8, device=triton_device)
    weight = torch.randint(-127, 128, (channels, size), dtype=torch.int8, device=triton_device)
    if rows == 1:
        x, weight = torch.full_like(x, 127), torch.full_like(weight, -127)
    ones = torch.ones(max(rows, channels), device=triton_device)
    assert product(x, ones[:rows], weight, ones[:channels]).equal((x.double() @ weight.double().T).float())


@pytest.mark.parametrize(("rows", "size"), [(16, 272), (65, 144)])
def test_kernel_sums_fp8_in_float32(triton_device: str, rows: int, size: int) -> None:
    """Relative to the largest sum. On Hopper a block of 128 products is summed in about 14 bits, the blocks in 24."""
    x, weight = (held_by("fp8", number, size, device=triton_device) for number in (rows, 65))
    ones = torch.ones(65, device=triton_device)
    result = product(x.to(DTYPES["fp8"]), ones[:rows], weight.to(DTYPES["fp8"]), ones)
    expected = (x.double() @ weight.double().T).float()
    tolerance = 1e-6 if triton_device == "cpu" else 1e-3
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_large_tiles_sum_int8_exactly_in_any_order_of_programs(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles for thousands of rows, taken here for few; 9 rows of tiles are a whole group and part of another."""
    from fewstep.kernels import quantised_linear_triton

    monkeypatch.setattr(quantised_linear_triton, "LEAST_PROGRAMS", 1)
    x = torch.randint(-127, 128, (1030, 144), dtype=torch.int8, device=triton_device)
    weight = torch.randint(-127, 128, (131, 144), dtype=torch.int8, device=triton_device)
    ones = torch.ones(1030, device=triton_device)
    assert quantised_linear_triton.tile_for(1030, 131) == quantised_linear_triton.LARGE_TILE
    assert product(x, ones, weight, ones[:131]).equal((x.double() @ weight.double().T).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "channels", "size", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (3, 7, 3, torch.float16),
        (1, 3, 1023, torch.bfloat16),
        (2, 1023, 7, torch.float16),
        *((17, 16, 64, dtype) for dtype in INPUTS),
    ],
)
def test_kernel_equals_the_reference_at_any_size(
    triton_device: str, rows: int, channels: int, size: int, kind: Kind, dtype: torch.dtype
) -> None:
    x = held_by(kind, rows, size, device=triton_device).to(dtype)
    weight = quantise_weight(torch.randn(channels, size, device=triton_device), kind)
    for bias in (None, torch.randn(channels, device=triton_device).to(dtype)):
        result = launch(x, weight, bias)
        assert result.dtype == dtype
        check_result(result, quantised_linear_reference(x, weight, bias))


@pytest.mark.parametrize(("rows", "channels", "size"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_of_nothing_is_nothing_or_the_bias(
    triton_device: str, kind: Kind, rows: int, channels: int, size: int
) -> None:
    x = torch.zeros(rows, size, device=triton_device)
    weight = quantise_weight(torch.zeros(channels, size, device=triton_device), kind)
    bias = torch.randn(channels, device=triton_device)
    assert launch(x, weight, bias).equal(bias.expand(rows, channels))


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_takes_weights_and_biases_with_strides(triton_device: str, kind: Kind) -> None:
    x = held_by(kind, 5, 32, device=triton_device)
    whole = quantise_weight(torch.randn(9, 40, device=triton_device), kind)
    weight = QuantisedWeight(whole.values[::2, 3:35], whole.scales[::2])
    bias = torch.randn(10, device=triton_device)[::2]
    assert not any(part.is_contiguous() for part in (weight.values, weight.scales, bias))
    transposed = QuantisedWeight(
        quantise_weight(torch.randn(32, 5, device=triton_device), kind).values.T, weight.scales
    )
    assert transposed.values.stride() == (1, 5)
    for strided in (weight, transposed):
        check_result(launch(x, strided, bias), quantised_linear_reference(x, strided, bias))


def launch(x: Tensor, quantised: QuantisedWeight, bias: Tensor | None) -> Tensor:
    from fewstep.kernels.quantised_linear_triton import launch_quantised_linear

    with numpy.errstate(all="ignore"):
        return launch_quantised_linear(x, quantised, bias)


def check_result(result: Tensor, expected: Tensor) -> None:
    """Relative to the largest of the results, as sums of both signs cancel."""
    scale = float(expected.abs().max())
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * scale)
