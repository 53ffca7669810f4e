"""GroupNorm with scale, shift and SiLU: the Triton kernels against the torch reference, and the reference itself."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fewstep.kernels.group_norm import group_norm_silu, group_norm_silu_reference

# float32: sums in another order, and a GPU's exp and 1 / sqrt of 2 ulp; halves: one rounding of the result (float16
# 2**-11, bfloat16 2**-8), twice that in the interpreter, which cuts bfloat16 off.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def launch(x: Tensor, groups: int, **options: Any) -> Tensor:
    from fewstep.kernels.group_norm_triton import launch

    with numpy.errstate(over="ignore"):  # the interpreter computes with numpy, also what is masked: exp(1000) say
        return launch(x, groups, **options)


@pytest.fixture(params=["held", "chunked"])
def way(request: pytest.FixtureRequest, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of a kernel for shapes that are quick to interpret: chunks are short, and of several blocks."""
    from fewstep.kernels import group_norm_chunks_triton, group_norm_triton

    if request.param == "chunked":
        monkeypatch.setattr(group_norm_triton, "FORWARD_LIMIT", 0)
        monkeypatch.setattr(group_norm_triton, "BACKWARD_LIMIT", 0)
        monkeypatch.setattr(group_norm_chunks_triton, "BLOCK", 256)
        monkeypatch.setattr(group_norm_chunks_triton, "PROGRAMS", 4)
        monkeypatch.setattr(group_norm_chunks_triton, "MERGED", 16)
    return triton_device


def parameters(x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All of them, as networks have them: about 1 and 0, and scale and shift halves of one tensor."""
    samples, channels = x.shape[:2]
    weight, bias = torch.randn(2, channels, device=x.device).to(dtype or x.dtype)
    scale, shift = torch.randn(samples, 2 * channels, device=x.device).to(dtype or x.dtype).chunk(2, dim=1)
    return {"weight": 1 + weight / 4, "bias": bias, "scale": scale / 4, "shift": shift}


def check(x: Tensor, groups: int, vectors: dict[str, Tensor], **options: Any) -> Tensor:
    """Result and every gradient against the reference in float64."""
    leaves = {"x": x, **vectors}
    wide = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    expected = group_norm_silu_reference(groups=groups, **wide, **options)
    upstream = torch.randn(expected.shape, device=x.device).to(x.dtype)
    expected.backward(upstream.double())
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    result = launch(groups=groups, **leaves, **options)
    result.backward(upstream)
    assert result.dtype == x.dtype
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    for name, leaf in leaves.items():
        exact = wide[name].grad
        assert leaf.grad is not None
        assert exact is not None
        assert leaf.grad.dtype == leaf.dtype
        # Sums have the error of their terms, not of themselves.
        size = max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=tolerance, atol=tolerance * size, msg=name)
    return result


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 2, 1), 1),  # one number a channel
        ((2, 6, 3), 3),
        ((2, 6, 7, 1), 2),
        ((1, 15, 3, 7), 5),  # odd channels and sizes
        ((2, 7, 3, 3), 1),  # one group
        ((2, 9, 3, 3), 9),  # each channel its own
        ((1, 2, 31, 33), 1),  # 1023 positions
        ((1, 80, 2, 3), 2),  # more channels than a block
        ((1, 4, 2, 2, 65), 2),
    ],
)
def test_kernels_equal_the_reference_at_any_size(way: str, shape: tuple[int, ...], groups: int) -> None:
    x = torch.randn(shape, device=way)
    assert check(x, groups, parameters(x)).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_equal_the_reference_in_halves(way: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 15, 3, 7, device=way).to(dtype)
    check(x, 5, parameters(x))


@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 6, 5), 3), ((2, 15, 3, 7), 5), ((1, 70, 2, 9), 7), ((2, 6, 2, 3, 3), 1)]
)
def test_kernels_keep_channels_last(way: str, shape: tuple[int, ...], groups: int) -> None:
    x = torch.randn(shape, device=way).movedim(1, -1).contiguous().movedim(-1, 1)
    result = check(x, groups, parameters(x))
    assert result.stride() == x.stride()


def test_kernels_take_any_strides(way: str) -> None:
    x = torch.randn(2, 6, 5, 8, device=way)
    for strided in (x[:, ::2], x[..., ::2], x.mT, x[:1].expand(2, -1, -1, -1)):
        assert not strided.is_contiguous()
        channels = strided.shape[1]
        weight, scale = torch.randn(2 * channels, device=way)[::2], torch.randn(2, 1, device=way).expand(2, channels)
        check(strided, 3, {"weight": weight, "scale": scale})


@pytest.mark.parametrize(
    ("names", "activation"),
    [((), False), (("weight", "bias"), True), (("bias",), False), (("scale",), True), (("shift", "weight"), False)],
)
def test_kernels_leave_out_what_is_not_given(way: str, names: tuple[str, ...], activation: bool) -> None:
    x = torch.randn(2, 6, 5, device=way)
    check(x, 3, {name: parameters(x)[name] for name in names}, activation=activation, epsilon=0.1)


def test_half_precision_takes_float32_parameters(way: str) -> None:
    x = torch.randn(2, 6, 5, device=way).half()
    check(x, 3, parameters(x, torch.float32))


def test_a_large_mean_does_not_cancel(way: str) -> None:
    """float32 holds 1000 to 6e-5; a mean of squares less the square of the mean would be wrong by a tenth."""
    x = (1000 + torch.randn(1, 4, 9, 15, device=way)).requires_grad_()
    expected = group_norm_silu_reference(x.double(), 2)
    torch.testing.assert_close(launch(x, 2).double(), expected, rtol=1e-3, atol=1e-3)


def test_result_without_gradients_is_the_same(way: str) -> None:
    x = torch.randn(2, 6, 5, device=way, requires_grad=True)
    with torch.no_grad():
        result = launch(x, 3)
    assert not result.requires_grad
    torch.testing.assert_close(result, launch(x, 3), rtol=0, atol=0)


def test_kernels_take_a_gradient_of_any_strides(way: str) -> None:
    """The gradient of a sum is a single number, expanded."""
    x = torch.randn(2, 6, 5, device=way, requires_grad=True)
    (found,) = torch.autograd.grad(launch(x, 3).sum(), x)
    (expected,) = torch.autograd.grad(group_norm_silu_reference(x, 3).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_asked_for_are_computed(way: str) -> None:
    x = torch.randn(2, 6, 5, device=way)
    vectors = parameters(x)
    vectors["shift"] = vectors["shift"].clone().requires_grad_()
    launch(x, 3, **vectors).sum().backward()
    assert vectors["shift"].grad is not None
    assert x.grad is None


@pytest.mark.parametrize("channels_last", [False, True])
def test_kernels_address_in_int64(triton_device: str, channels_last: bool) -> None:
    """Row 16 of 2**27 numbers begins at number 2**31; of that memory only the rows' beginnings are ever touched."""
    from fewstep.kernels.group_norm_chunks_triton import normalise
    from fewstep.kernels.group_norm_triton import group_forward

    rows, columns, width = 17, 4, 2**27
    x, result = (torch.empty(rows, width, dtype=torch.float16, device=triton_device) for _ in range(2))
    x[:, :columns] = torch.randn(rows, columns)
    start = x[:, :columns].float()
    if channels_last:
        channels, positions, tile = width, rows, {"POSITIONS": 32, "CHANNELS": columns}
    else:
        channels, positions, tile = rows, width, {"POSITIONS": columns, "CHANNELS": 32}
    constants = {"CHANNELS_LAST": channels_last, "ACTIVATION": True, **tile}

    coefficients = torch.empty(4, channels, device=triton_device)
    coefficients[:, :rows] = torch.tensor([0.0, 1.0, 1.0, 0.0], device=triton_device)[:, None]
    normalise[(1,)](x, result, coefficients, channels, positions, 1, **constants)
    expected = torch.nn.functional.silu(start)
    torch.testing.assert_close(result[:, :columns].float(), expected, rtol=2e-3, atol=1e-3)

    group_channels = columns if channels_last else rows
    groups, size = channels // group_channels, group_channels * positions
    options = {"GROUP_CHANNELS": group_channels, "GROUPS": 1, **constants}
    group_forward[(1,)](x, result, *(None,) * 5, 0, 0, 0.1, groups, positions, **options)
    centred = start - start.sum() / size
    expected = torch.nn.functional.silu(centred / ((centred**2).sum() / size + 0.1).sqrt())
    torch.testing.assert_close(result[:, :columns].float(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)])
def test_nothing_gives_nothing(device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    result = group_norm_silu(x, 2)
    result.sum().backward()
    assert result.shape == shape
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("groups", [0, 4])
def test_groups_divide_the_channels(device: str, groups: int) -> None:
    with pytest.raises(ValueError, match=f"6 channels do not make {groups} groups"):
        group_norm_silu(torch.zeros(2, 6, 3, device=device), groups)


def test_reference_has_exact_gradients() -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    vectors = [value.detach().requires_grad_() for value in parameters(x).values()]

    def function(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return group_norm_silu_reference(x, 2, weight, bias, 1e-5, scale, shift)

    assert torch.autograd.gradcheck(function, (x, *vectors))


def test_reference_is_the_scale_shift_norm_of_diffusers() -> None:
    from diffusers.models.normalization import AdaGroupNorm

    norm = AdaGroupNorm(8, 6, 3)
    x, embedding = torch.randn(2, 6, 4, 4), torch.randn(2, 8)
    scale, shift = norm.linear(embedding).chunk(2, dim=1)
    found = group_norm_silu(x, 3, epsilon=norm.eps, scale=scale, shift=shift, activation=False)
    torch.testing.assert_close(found, norm(x, embedding))


def test_reference_is_torchs_norm_and_activation_and_keeps_channels_last(device: str) -> None:
    norm = torch.nn.GroupNorm(3, 6, device=device)
    x = torch.randn(2, 6, 4, 4, device=device).to(memory_format=torch.channels_last)
    found = group_norm_silu(x, 3, norm.weight, norm.bias)
    torch.testing.assert_close(found, torch.nn.functional.silu(norm(x)))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_halves_are_computed_in_float32(device: str) -> None:
    """60,000 squared is beyond float16."""
    x = torch.tensor([[[60_000.0, -60_000.0]]], device=device, dtype=torch.float16)
    assert group_norm_silu(x, 1, activation=False).tolist() == [[[1.0, -1.0]]]
