"""The noise of torch and of the Triton kernel against the numpy noise that pictures are made of."""

import numpy
import pytest
import torch
from torch import Tensor

from fewstep.kernels.philox import gaussian_noise, gaussian_noise_reference, pack_seeds, philox
from fewstep.runtime.noise import gaussian_noise as numpy_noise
from fewstep.runtime.noise import philox as numpy_philox

SEEDS = [0, 5, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
SHAPES = [(1,), (3,), (7,), (1023,), (512,), (1025,), (4, 8, 8), ()]

# All comparisons are to the bit. The float64 values of two libraries differ in their last bit now and then; float32
# shows it where a rounding boundary lies between them: about once in 5e8 numbers for each unit in the last place.


def launch(seeds: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    from fewstep.kernels.philox_triton import launch

    return launch(seeds, step, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [0, 1, 2**31 - 1])
def test_kernel_equals_numpy_to_the_bit(triton_device: str, shape: tuple[int, ...], step: int) -> None:
    noise = launch(pack_seeds(SEEDS, triton_device), step, shape)
    assert noise.dtype == torch.float32
    numpy.testing.assert_array_equal(noise.cpu().numpy(), numpy_noise(SEEDS, step, shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [0, 1, 2**31 - 1])
def test_torch_equals_numpy_to_the_bit(device: str, shape: tuple[int, ...], step: int) -> None:
    noise = gaussian_noise_reference(pack_seeds(SEEDS, device), step, shape)
    assert noise.dtype == torch.float32
    numpy.testing.assert_array_equal(noise.cpu().numpy(), numpy_noise(SEEDS, step, shape))


def test_dispatch_equals_numpy_in_a_million_numbers(device: str) -> None:
    noise = gaussian_noise([7], 3, (1_000_000,), device)
    numpy.testing.assert_array_equal(noise.cpu().numpy(), numpy_noise([7], 3, (1_000_000,)))


def test_words_equal_numpys_for_any_counter_and_key() -> None:
    """Counters and keys beyond what noise reaches: the upper halves of all products are exact."""
    words = torch.randint(2**32, (6, 1000))
    words[:, 0], words[:, 1] = 0, 2**32 - 1
    c0, c1, c2, c3, k0, k1 = words
    drawn = philox((c0, c1, c2, c3), (k0, k1))
    for column in range(0, 1000, 7):
        counter = tuple(words[index, column : column + 1].numpy().astype(numpy.uint64) for index in range(4))
        expected = numpy_philox(counter, (int(k0[column]), int(k1[column])))
        assert [int(word[column]) for word in drawn] == [int(word[0]) for word in expected]


def test_seeds_may_be_strided(triton_device: str) -> None:
    packed = pack_seeds([3, 0, 4, 0], triton_device)[::2]
    torch.testing.assert_close(launch(packed, 1, (5,)), gaussian_noise_reference(packed, 1, (5,)), rtol=0, atol=0)


@pytest.mark.parametrize(("seeds", "shape"), [([], (4,)), ([1, 2], (0,)), ([1], (3, 0))])
def test_noise_of_nothing_is_nothing(triton_device: str, seeds: list[int], shape: tuple[int, ...]) -> None:
    packed = pack_seeds(seeds, triton_device)
    for noise in (launch(packed, 0, shape), gaussian_noise_reference(packed, 0, shape)):
        assert noise.shape == (len(seeds), *shape)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed {seed} is out of range"):
        gaussian_noise([0, seed], 0, [4], "cpu")


def test_kernel_addresses_more_than_31_bits(triton_device: str) -> None:
    """The start of a sample 2^31 numbers in; memory that nobody touches costs nothing on a CPU."""
    from fewstep.kernels.philox_triton import BLOCK, kernel

    noise = torch.empty(2**31 + BLOCK, dtype=torch.float16, device=triton_device)
    kernel[(3,)](pack_seeds([1, 2, 3], triton_device), noise, 0, 2**30, 1, BLOCK=BLOCK)
    expected = gaussian_noise([3], 0, [BLOCK], triton_device)[0].half()
    torch.testing.assert_close(noise[2**31 :], expected)
