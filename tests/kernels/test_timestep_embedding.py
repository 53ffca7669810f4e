"""The timestep embedding: its reference against diffusers and against autograd, its Triton kernels against both."""

import math
from functools import partial

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor
from torch.nn import functional

from fewstep.kernels.timestep_embedding import sinusoids, timestep_embedding, timestep_embedding_reference

# float32: the order of the sums, and one unit in the last place of a frequency, which a time of 1000 magnifies to 6e-5
# of an angle; of its sinusoid a layer of these weights passes on a tenth. Halves: one rounding of the result, which
# the interpreter does by cutting off.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
OPTIONS = (True, 0.0, 1.0, 10000)


def times(batch: int, device: str) -> Tensor:
    return torch.rand(batch, device=device) * 999


def layers(channels: int, hidden: int, features: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(hidden, channels), (hidden,), (features, hidden), (features,)]
    return [(torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype) for shape in shapes]


def launch(t: Tensor, channels: int, layers: list[Tensor], options: tuple[bool, float, float, int] = OPTIONS) -> Tensor:
    from fewstep.kernels.timestep_embedding_triton import launch

    return launch(t, channels, *layers, *options)


@pytest.mark.parametrize(
    ("channels", "flips", "shift", "scale"),
    [(320, True, 0.0, 1), (256, False, 1.0, 1000), (7, True, 1.0, 1), (5, False, 0.0, 1)],
)
def test_kernels_and_reference_equal_diffusers(
    triton_device: str, channels: int, flips: bool, shift: float, scale: int
) -> None:
    waves = Timesteps(channels, flips, shift, scale)
    network = TimestepEmbedding(channels, 12, out_dim=10).to(triton_device).requires_grad_(False)
    weights = [parameter for layer in (network.linear_1, network.linear_2) for parameter in (layer.weight, layer.bias)]
    t = times(3, triton_device) / scale
    expected, options = network(waves(t)), (flips, shift, float(scale))
    torch.testing.assert_close(sinusoids(t, channels, *options, 10000), waves(t))
    torch.testing.assert_close(timestep_embedding(t, channels, *weights, *options), expected)
    found = launch(t, channels, weights, (*options, 10000))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "channels", "hidden", "features"),
    [(1, 2, 1, 1), (1, 6, 3, 7), (3, 14, 9, 8), (4, 64, 40, 16), (3, 32, 300, 3), (1, 2047, 8, 9), (64, 16, 8, 17)],
)
def test_kernels_equal_the_reference_at_any_size(
    triton_device: str, batch: int, channels: int, hidden: int, features: int, dtype: torch.dtype
) -> None:
    t, weights = times(batch, triton_device), layers(channels, hidden, features, triton_device, dtype)
    result = launch(t, channels, weights)
    assert result.dtype == dtype
    expected = timestep_embedding_reference(t, channels, *weights, *OPTIONS)
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_times_may_have_any_dtype(triton_device: str, dtype: torch.dtype) -> None:
    t, weights = torch.tensor([0, 499, 999], device=triton_device, dtype=dtype), layers(8, 6, 5, triton_device)
    expected = timestep_embedding(t.float(), 8, *weights)
    torch.testing.assert_close(timestep_embedding(t, 8, *weights), expected)
    torch.testing.assert_close(launch(t, 8, weights), expected, rtol=1e-5, atol=TOLERANCE[torch.float32])


def test_kernels_take_any_strides(triton_device: str) -> None:
    t, weights = times(6, triton_device)[::2], layers(8, 6, 6, triton_device)
    weights = [weights[0].T.contiguous().T, weights[1].repeat_interleave(2)[::2], weights[2].T, weights[1].flip(0)]
    assert not any(tensor.is_contiguous() for tensor in (t, *weights[:3]))
    expected = timestep_embedding_reference(t, 8, *weights, *OPTIONS)
    torch.testing.assert_close(launch(t, 8, weights), expected, rtol=1e-5, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize(("batch", "features"), [(0, 4), (2, 0)])
def test_embedding_of_nothing_is_nothing(triton_device: str, batch: int, features: int) -> None:
    t, weights = times(batch, triton_device), layers(4, 3, max(features, 1), triton_device)
    weights[2:] = [weights[2][:features], weights[3][:features]]
    assert launch(t, 4, weights).shape == timestep_embedding(t, 4, *weights).shape == (batch, features)


def test_every_gradient_of_the_reference(device: str) -> None:
    t = torch.rand(2, dtype=torch.float64, device=device).requires_grad_()
    weights = [layer.double().requires_grad_() for layer in layers(6, 4, 3, device)]

    def embed(t: Tensor, *weights: Tensor) -> Tensor:
        return timestep_embedding(t, 6, *weights, scale=3.0)

    torch.autograd.gradcheck(embed, (t, *weights))


@pytest.mark.parametrize("place", range(5))
def test_gradients_reach_whatever_tensor_wants_one(device: str, place: int) -> None:
    """On a GPU too, where the kernels know none: torch does the work then."""
    tensors = [times(2, device), *layers(6, 4, 3, device)]
    tensors[place].requires_grad_()
    embed = partial(timestep_embedding, tensors[0], 6, *tensors[1:])
    (gradient,) = torch.autograd.grad(embed().sum(), tensors[place])
    assert gradient.isfinite().all()
    assert gradient.any()
    with torch.no_grad():
        assert not embed().requires_grad


def test_halves_are_computed_in_float32(device: str) -> None:
    """Hidden numbers of 80,000 are beyond float16's range, their difference is not."""
    weights = [torch.zeros(2, 4), torch.full((2,), 60_000.0), torch.tensor([[1.0, -1.0]]), torch.ones(1)]
    weights[0][:, :2] = 20_000.0  # of a cosine that is 1 at t = 0
    embedding = timestep_embedding(torch.zeros(1, device=device), 4, *(layer.to(device).half() for layer in weights))
    torch.testing.assert_close(embedding, torch.ones(1, 1, device=device, dtype=torch.float16))


def test_kernel_addresses_more_than_31_bits(triton_device: str) -> None:
    """The weights of feature 8 start 2^31 numbers in; memory that nobody touches costs nothing on a CPU."""
    from fewstep.kernels.timestep_embedding_triton import block_sizes, first_layer

    stride, (row, bias, *_) = 2**28, layers(4, 9, 1, triton_device, torch.float16)
    weight = torch.empty(8 * stride + 4, dtype=torch.float16, device=triton_device)
    weight[-4:] = row[8]
    t, hidden = times(1, triton_device), torch.empty(1, 9, device=triton_device)
    frequencies, sizes = (-math.log(10000), 2.0, 1.0), (1, 2, stride, 9)
    first_layer[(2, 1)](t, weight, bias, hidden, *frequencies, *sizes, FLIPS=True, **block_sizes(1))
    expected = functional.silu(functional.linear(sinusoids(t, 4, *OPTIONS), row[8:].float(), bias[8:].float()))
    torch.testing.assert_close(hidden[:, 8:], expected, rtol=1e-5, atol=TOLERANCE[torch.float32])
