"""The 8-bit linear layer: its Triton kernels against the torch reference, and the reference against what theory allows.

Triton's interpreter multiplies int8 exactly, so the kernels equal the reference to the bit. It also reads and
multiplies every finite fp8 value exactly, but takes NaN for 480, and its cast from float32 to fp8 is not the GPU's: it
rounds ties up and loses the carry into the exponent. There, the kernel that quantises is tested on numbers that fp8
holds, which any cast leaves alone; the rounding is tested on the reference, with which a GPU's is compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.kernels.quantised_linear import (
    DTYPES,
    LIMITS,
    Kind,
    QuantisedLinear,
    QuantisedWeight,
    quantise_rows,
    quantise_rows_reference,
    quantise_weight,
    quantised_linear,
    quantised_linear_reference,
)

KINDS: list[Kind] = ["int8", "fp8"]
INPUTS = [torch.float32, torch.float16, torch.bfloat16]
# float32: a sum may be fused with the product before it; halves: the result's rounding, which bfloat16's in the
# interpreter does by cutting off.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory that a program may take on GPUs of compute capability 8.6, 8.9 and 12.0."""


def equal_bits(values: Tensor, expected: Tensor) -> bool:
    return values.dtype == expected.dtype and values.view(torch.uint8).equal(expected.view(torch.uint8))


def held_by(kind: Kind, *shape: int, device: str = "cpu") -> Tensor:
    """Numbers that the kind holds, the largest of each row at its limit: quantising changes none of them."""
    x = (torch.randn(shape, device=device) * LIMITS[kind] / 4).clamp(-LIMITS[kind], LIMITS[kind])
    x[..., -1] = LIMITS[kind]
    return (x.round() if kind == "int8" else x).to(DTYPES[kind]).float()


def largest_rounding(x: Tensor, kind: Kind) -> Tensor:
    """The most that quantising can move each number of (rows, K): half a step, and 1e-5 of it for the scale's rounding.

    The steps of int8 are the row's scale; those of fp8 at most an eighth of the number, as three bits follow its
    leading one, or 2^-9 of the scale between subnormal numbers.
    """
    scale = x.abs().amax(1, keepdim=True) / LIMITS[kind]
    step = scale.expand_as(x) if kind == "int8" else torch.maximum(x.abs() / 8, scale / 512)
    return step / 2 * (1 + 1e-5)


# Quantising rows: the reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", INPUTS)
def test_rounding_moves_no_number_further_than_half_a_step(kind: Kind, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 1023) * torch.tensor([1e-12, 1e-3, 1.0, 1e3, 1e4])[:, None]).to(dtype)
    values, scales = quantise_rows_reference(x, kind)
    assert (values.dtype, scales.dtype, scales.shape) == (DTYPES[kind], torch.float32, (5,))
    moved = (values.double() * scales[:, None].double() - x.double()).abs()
    assert (moved <= largest_rounding(x.double(), kind)).all()


@pytest.mark.parametrize(
    ("kind", "x", "expected"),
    [
        ("int8", [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.0], [0, 2, 2, 0, -2, 126, 127]),
        ("fp8", [17.0, 19.0, 21.0, -17.0, 1.9375, 2.0**-10, 448.0], [16, 20, 20, -16, 2, 0, 448]),
    ],
)
def test_ties_go_to_even(kind: Kind, x: list[float], expected: list[float]) -> None:
    values, scales = quantise_rows_reference(torch.tensor([x]), kind)
    assert values.float().tolist() == [expected]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_magnitude_of_a_row_becomes_the_limit_whatever_its_size(kind: Kind) -> None:
    largest = torch.tensor([1e-29, 1e-9, 0.1, 7.0, 3.4e38])
    x = torch.stack([-largest, largest, largest / 2], dim=1)
    values = quantise_rows_reference(x, kind)[0].float()
    assert values[:, :2].tolist() == [[-LIMITS[kind], LIMITS[kind]]] * 5
    assert values.abs().max() == LIMITS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zeros_and_rows_that_are_not_finite_turn_nan_alone(kind: Kind, device: str) -> None:
    x = torch.randn(4, 5, device=device)
    x[0], x[1, 2], x[2, 3] = 0.0, torch.nan, -torch.inf
    values, scales = quantise_rows(x, kind)
    assert not values[:3].float().any()
    assert scales.isnan().tolist() == [False, True, True, False]
    weight = quantise_weight(torch.randn(3, 5, device=device), kind)
    result = quantised_linear(x, weight)
    assert not result[0].any()
    assert result[1:3].isnan().all()
    assert result[3:].equal(quantised_linear(x[3:], weight))


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantising_what_was_dequantised_changes_nothing(kind: Kind, dtype: torch.dtype) -> None:
    once = quantise_weight(torch.randn(7, 33).to(dtype), kind)
    twice = quantise_weight(once.dequantise(), kind)
    assert once.kind == twice.kind == kind
    assert equal_bits(twice.values, once.values)
    torch.testing.assert_close(twice.scales, once.scales, rtol=1e-6, atol=0)


# Quantising rows: the kernel


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


# The product: the kernel


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


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "channels", "size"), [(1, 1, 1), (3, 7, 3), (1, 3, 1023), (2, 1023, 7), (17, 16, 64)])
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


@pytest.mark.parametrize("kind", KINDS)
def test_programs_fit_in_shared_memory(triton_device: str, kind: Kind, tmp_path: Path) -> None:
    """The large tile, compiled for GPUs with little of it; the small tiles' pipelines by arithmetic."""
    from fewstep.kernels.quantised_linear_triton import LARGE_TILE, SMALL_TILES

    assert all((tile.m + tile.n) * tile.k * tile.stages <= SHARED_LIMIT for tile in (*SMALL_TILES, LARGE_TILE))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE_LARGE, kind], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert min(taken) > 0
    assert max(taken) <= SHARED_LIMIT


COMPILE_LARGE = """
import json, sys
from fewstep.kernels.compilation import compile_kernel
from fewstep.kernels.quantised_linear_triton import LARGE_TILE, configurations

name = f"product-{sys.argv[1]}-{LARGE_TILE.m}x{LARGE_TILE.n}"
(large,) = [configuration for configuration in configurations("bf16") if configuration.name == name]
capabilities = [capability for capability in (86, 89, 120) if capability >= large.lowest_capability]
print(json.dumps([compile_kernel(large, capability).shared_bytes for capability in capabilities]))
"""


# The layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "size"), [(1, 1), (3, 7), (7, 3), (64, 1023), (1023, 64)])
def test_error_stays_within_what_rounding_allows(device: str, kind: Kind, channels: int, size: int) -> None:
    """|y - y_q| <= sum_k |x||dw| + |dx||w| + |dx||dw|, where dx and dw are the most that rounding moves x and w."""
    linear = nn.Linear(size, channels, device=device)
    x = torch.randn(4, size, device=device)
    weight = linear.weight.detach()
    with torch.no_grad():
        error = (QuantisedLinear.from_linear(linear, kind)(x) - linear(x)).abs().double()
    dx, dw = largest_rounding(x.double(), kind), largest_rounding(weight.double(), kind)
    bound = x.abs().double() @ dw.T + dx @ weight.abs().double().T + dx @ dw.T
    assert (error <= bound + 1e-6).all()  # and float32's own rounding of both results


def test_int8_error_is_that_of_uniform_rounding(device: str) -> None:
    """Rounding to steps of s adds a variance of s^2 / 12 to x and to w, independent of both."""
    x, weight = torch.randn(256, 512, device=device), torch.randn(256, 512, device=device)
    exact = x.double() @ weight.double().T
    error = quantised_linear(x, quantise_weight(weight, "int8")).double() - exact
    steps = [quantise_rows(value, "int8")[1].double().square().mean() for value in (x, weight)]
    predicted = (sum(steps) / 12).sqrt()
    assert float(error.square().mean().sqrt() / exact.std()) == pytest.approx(float(predicted), rel=0.03)
    assert float(predicted) < 0.012


@pytest.mark.parametrize(("kind", "ratio"), [("int8", 1e-3), ("fp8", 1e-5)])
def test_a_scale_per_channel_keeps_channels_that_are_far_smaller(device: str, kind: Kind, ratio: float) -> None:
    """int8 would lose a channel 1000 times smaller than another; fp8, whose numbers have exponents, one of 10^5."""
    weight = torch.randn(2, 256, device=device) * torch.tensor([[1.0], [ratio]], device=device)
    x = torch.randn(64, 256, device=device)
    exact = x @ weight.T
    per_channel = quantised_linear(x, quantise_weight(weight, kind))
    values, scale = quantise_rows(weight.reshape(1, -1), kind)
    per_tensor = quantised_linear(x, QuantisedWeight(values.view(2, 256), scale.expand(2).contiguous()))

    def small_error(result: Tensor) -> float:
        return float((result - exact)[:, 1].norm() / exact[:, 1].norm())

    assert small_error(per_channel) < 0.05
    assert small_error(per_tensor) > 3 * small_error(per_channel)


@pytest.mark.parametrize("dtype", [*INPUTS, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_x_of_any_shape_strides_and_dtype(device: str, kind: Kind, dtype: torch.dtype) -> None:
    weight = quantise_weight(torch.randn(7, 6, device=device), kind)
    x = torch.randn(2, 6, 3, 5, device=device).to(dtype)
    expected = quantised_linear(x.movedim(1, -1).reshape(30, 6), weight)
    assert expected.dtype == dtype
    assert quantised_linear(x.movedim(1, -1), weight).equal(expected.view(2, 3, 5, 7))
    torch.testing.assert_close(quantised_linear(x[0, :, 0, 0], weight), expected[0])
    assert quantised_linear(x.movedim(1, -1)[:0], weight).shape == (0, 3, 5, 7)
    values, scales = quantise_rows(x.movedim(1, -1), kind)
    assert (values.shape, scales.shape) == ((2, 3, 5, 6), (2, 3, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_the_sums(device: str, kind: Kind) -> None:
    x, weight = torch.randn(4, 32, device=device), quantise_weight(torch.randn(8, 32, device=device), kind)
    with torch.autocast(device, torch.bfloat16):
        inside = quantised_linear(x, weight)
    assert inside.equal(quantised_linear(x, weight))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_survives_safetensors(kind: Kind, bias: bool, tmp_path: Path) -> None:
    layer = QuantisedLinear.from_linear(nn.Linear(5, 3, bias), kind)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    dtypes = {"values": DTYPES[kind], "scales": torch.float32} | ({"bias": torch.float32} if bias else {})
    assert {name: value.dtype for name, value in state.items()} == dtypes
    loaded = QuantisedLinear(5, 3, bias, kind)
    loaded.load_state_dict(state)
    x = torch.randn(4, 5)
    assert loaded(x).equal(layer(x))
    assert str(loaded) == f"QuantisedLinear(5, 3, bias={bias}, kind='{kind}')"


def test_a_state_of_the_other_kind_is_refused() -> None:
    model = nn.Sequential(QuantisedLinear(5, 3, True, "int8"))
    with pytest.raises(RuntimeError, match=r"0\.values are torch\.float8_e4m3fn, not torch\.int8"):
        model.load_state_dict(nn.Sequential(QuantisedLinear(5, 3, True, "fp8")).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_layer_keeps_its_dtypes_when_the_model_changes_its_own(kind: Kind, device: str) -> None:
    model = nn.Sequential(QuantisedLinear.from_linear(nn.Linear(5, 3), kind), nn.Linear(3, 3))
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    model.to(device, torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16
    assert model[0].values.device.type == device
    assert all(equal_bits(value.cpu(), before[name]) for name, value in model[0].state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_layer_is_what_the_8_bits_stand_for(kind: Kind, bias: bool, device: str) -> None:
    layer = QuantisedLinear.from_linear(nn.Linear(33, 7, bias, device=device), kind)
    x = torch.randn(4, 33, device=device)
    values, scales = quantise_rows(x, kind)
    with torch.no_grad():
        expected = layer.dequantise()(values.float() * scales[:, None])
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_said() -> None:
    weight = quantise_weight(torch.randn(3, 5), "int8")
    with pytest.raises(ValueError, match=r"x \(2, 4\) do not fit a weight \(3, 5\): give"):
        quantised_linear(torch.randn(2, 4), weight)
    with pytest.raises(ValueError, match=r"and the bias \(5,\) do not fit"):
        quantised_linear(torch.randn(2, 5), weight, torch.randn(5))
    with pytest.raises(ValueError, match="no kind 'int4'"):
        quantise_weight(torch.randn(3, 5), "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite"):
        quantise_weight(torch.full((3, 5), torch.inf), "int8")


def test_gradients_are_refused_where_they_would_silently_be_lost() -> None:
    layer = QuantisedLinear.from_linear(nn.Linear(5, 3), "int8")
    assert not list(layer.parameters())
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"has no gradients: call it under torch\.no_grad"):
        layer(x)
    with torch.no_grad():
        assert layer(x).equal(layer(x.detach()))
