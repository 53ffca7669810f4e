"""The 8-bit linear layer: its reference and its module against what theory allows."""

from pathlib import Path

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
)

from .quantised_inputs import INPUTS, KINDS, equal_bits


def largest_rounding(x: Tensor, kind: Kind) -> Tensor:
    """The most that quantising can move each number of (rows, K): half a step, and 1e-5 of it for the scale's rounding.

    The steps of int8 are the row's scale; those of fp8 at most an eighth of the number, as three bits follow its
    leading one, or 2^-9 of the scale between subnormal numbers.
    """
    scale = x.abs().amax(1, keepdim=True) / LIMITS[kind]
    step = scale.expand_as(x) if kind == "int8" else torch.maximum(x.abs() / 8, scale / 512)
    return step / 2 * (1 + 1e-5)


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
