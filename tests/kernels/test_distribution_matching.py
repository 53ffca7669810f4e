"""The distribution-matching gradient: its Triton kernel against the torch reference, and the reference itself."""

import numpy
import pytest
import torch
from torch import Tensor

from fewstep.kernels.distribution_matching import (
    distribution_matching_gradient,
    distribution_matching_gradient_reference,
)

# float32: another order of summation; halves: one rounding of the result, which the interpreter does by cutting off.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def samples(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for _ in range(3)]


def launch(x: Tensor, mu_fake: Tensor, mu_real: Tensor) -> Tensor:
    from fewstep.kernels.distribution_matching_triton import launch

    with numpy.errstate(divide="ignore", invalid="ignore"):  # the interpreter computes with numpy
        return launch(x, mu_fake, mu_real)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 3, 7, 1023, 2048, 4097])
def test_kernel_equals_the_reference_at_any_size(triton_device: str, size: int, dtype: torch.dtype) -> None:
    inputs = samples(triton_device, 3, size, dtype=dtype)
    result = launch(*inputs)
    assert result.dtype == dtype
    expected = distribution_matching_gradient_reference(*inputs)
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (16_383, torch.float32),
        (140_000, torch.float32),
        *((size, dtype) for size in (16_385, 70_001) for dtype in TOLERANCE),
    ],
)
def test_kernels_equal_the_reference_on_large_latents(triton_device: str, size: int, dtype: torch.dtype) -> None:
    """Around the largest sample that one program takes whole, and those that several share."""
    inputs = samples(triton_device, 2, size, dtype=dtype)
    expected = distribution_matching_gradient_reference(*inputs)
    torch.testing.assert_close(launch(*inputs), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [16_385, 32_768, 65_536, 131_073, 262_144, 1_048_577, 2**31 - 1, 2**35 + 3])
def test_chunks_cover_a_sample_and_are_few(triton_device: str, size: int) -> None:
    from fewstep.kernels.distribution_matching_triton import CHUNKS, chunk_sizes

    block, chunk = chunk_sizes(size)
    assert 512 <= block <= 4096
    assert chunk % block == 0
    assert size / chunk <= CHUNKS
    assert chunk == 512 or size / chunk > CHUNKS / 2  # none larger than it must be


def test_large_samples_do_not_depend_on_their_batch(triton_device: str) -> None:
    inputs = samples(triton_device, 3, 20_000)
    alone = torch.cat([launch(*(value[index : index + 1] for value in inputs)) for index in range(3)])
    torch.testing.assert_close(launch(*inputs), alone, rtol=0, atol=0)


def test_kernel_takes_any_strides(triton_device: str) -> None:
    x, mu_fake, mu_real = samples(triton_device, 2, 3, 7, 5)
    x, mu_real = x.to(memory_format=torch.channels_last), mu_real.mT.contiguous().mT
    mu_fake = mu_fake.repeat_interleave(2, dim=0)[::2]
    assert not any(value.is_contiguous() for value in (x, mu_fake, mu_real))
    expected = distribution_matching_gradient_reference(x, mu_fake, mu_real)
    torch.testing.assert_close(launch(x, mu_fake, mu_real), expected)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_kernel_of_nothing_is_nothing(triton_device: str, shape: tuple[int, int]) -> None:
    assert launch(*samples(triton_device, *shape)).shape == shape


@pytest.mark.parametrize("size", [10, 20_000])
def test_kernel_and_reference_turn_what_is_not_finite_into_zero(triton_device: str, size: int) -> None:
    inputs = troubled_samples(triton_device, size)
    torch.testing.assert_close(launch(*inputs), distribution_matching_gradient_reference(*inputs))


def test_what_is_not_finite_becomes_zero(device: str) -> None:
    result = distribution_matching_gradient_reference(*troubled_samples(device))
    assert not result[:2].any()
    assert result[2].isfinite().all()
    assert result[2].all()


def troubled_samples(device: str, size: int = 10) -> list[Tensor]:
    """Sample 0 sits on the teacher, so its scale is 0 (0 / 0 and 1 / 0); sample 1 holds a NaN; sample 2 is ordinary."""
    x, mu_fake, mu_real = samples(device, 3, size)
    mu_real[0] = x[0]
    mu_fake[0, :5] = x[0, :5]
    mu_real[1, 3] = float("nan")
    return [x, mu_fake, mu_real]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_reference_of_nothing_is_nothing(device: str, shape: tuple[int, int]) -> None:
    assert distribution_matching_gradient(*samples(device, *shape)).shape == shape


def test_halves_are_computed_in_float32(device: str) -> None:
    """60,000 and -60,000 are in float16's range, their difference is not; the quotient, 1, is again."""
    x = torch.full((1, 1000), 60_000.0, device=device, dtype=torch.float16)
    gradient = distribution_matching_gradient(x, x, -x)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_dispatch_equals_the_reference_and_leaves_no_graph(device: str) -> None:
    x, mu_fake, mu_real = samples(device, 2, 9)
    gradient = distribution_matching_gradient(x.requires_grad_(), mu_fake, mu_real)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, distribution_matching_gradient_reference(x.detach(), mu_fake, mu_real))


def test_kernels_address_more_than_31_bits(triton_device: str) -> None:
    """A sample that starts 2^31 numbers in; all tensors are views of one, whose rest costs a CPU no memory."""
    from fewstep.kernels.distribution_matching_triton import CHUNKS, sum_chunk, whole, write_chunk

    start, size = 2**31, 2**30
    memory = torch.empty(start + 4 * 512, dtype=torch.float16, device=triton_device)
    x, mu_real, mu_fake, gradient = (memory[offset:] for offset in range(0, 4 * 512, 512))
    partial = torch.empty(3, 1, device=triton_device)
    memory[start:] = torch.tensor([1.0, -1.0, -1.0 + 2.0**-10, 0.0]).repeat_interleave(512)
    with numpy.errstate(invalid="ignore"):  # samples 0 and 1 are what the memory held
        sum_chunk[(3,)](x, mu_real, partial, size, 512, 1, BLOCK=512)
        assert partial[2] == 2 * 512
        write_chunk[(3,)](mu_fake, mu_real, partial, gradient, size, 512, 1, CHUNKS=CHUNKS, BLOCK=512)
        assert (gradient[start:] == 2.0**-10 / (2 * 512 / size)).all()
        gradient[start:] = 0.0
        whole[(3,)](x, mu_fake, mu_real, gradient, size, BLOCK=512)
        assert (gradient[start:] == 2.0**-10 / (2 * 512 / size)).all()
