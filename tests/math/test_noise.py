"""Counter-based noise: known answers, moments, independence, and one seed one image."""

import numpy as np
import pytest

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.noise import gaussian_noise, philox, trajectory_noise

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32 with ten rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_known_answers_reach_the_noise() -> None:
    """Seed 0, step 0, element 0 is the all-zero counter and key: Box-Muller of the first known answer."""
    first, second, third, fourth = ((word + 0.5) / 2**32 for word in KNOWN_ANSWERS[0][2])
    radius = np.sqrt(-2 * np.log([first, first, third, third]))
    angle = 2 * np.pi * np.array([second, second, fourth, fourth])
    expected = radius * [np.cos(angle[0]), np.sin(angle[1]), np.cos(angle[2]), np.sin(angle[3])]
    np.testing.assert_allclose(gaussian_noise([0], 0, [4])[0], expected, rtol=1e-6)


def test_standard_normal_moments() -> None:
    noise = gaussian_noise([7], 3, [1_000_000])[0].astype(np.float64)
    error = 1 / np.sqrt(len(noise))
    assert abs(noise.mean()) < 4 * error
    assert abs(noise.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((noise**3).mean()) < 4 * np.sqrt(15) * error
    assert abs((noise**4).mean() - 3) < 4 * np.sqrt(96) * error
    # the tails: the share beyond three standard deviations is 0.0026998
    assert abs((abs(noise) > 3).mean() - 0.0026998) < 4 * np.sqrt(0.0027) * error


def test_neighbours_seeds_and_steps_are_independent() -> None:
    size = 200_000
    draws = [gaussian_noise([seed], step, [size])[0] for seed, step in [(0, 0), (0, 1), (0, 2), (1, 0), (2**32, 0)]]
    draws += [np.roll(draws[0], shift) for shift in (1, 2, 4)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert abs(correlation).max() < 5 / np.sqrt(size)


def test_an_image_does_not_depend_on_its_batch() -> None:
    together = gaussian_noise([5, 2**64 - 1, 9], 1, [3, 8, 8])
    assert together.shape == (3, 3, 8, 8)
    assert together.dtype == np.float32
    for image, seed in zip(together, [5, 2**64 - 1, 9], strict=True):
        np.testing.assert_array_equal(gaussian_noise([seed], 1, [3, 8, 8])[0], image)


@pytest.mark.parametrize("shape", [[3, 8, 8], [2, 3, 5]])
def test_a_trajectory_has_every_draw_of_its_images(shape: list[int]) -> None:
    seeds = [2**64 - 1, 0, 5]
    noise = trajectory_noise(seeds, 4, shape)
    assert noise.flags.c_contiguous
    np.testing.assert_array_equal(noise, np.stack([gaussian_noise(seeds, step, shape) for step in range(4)], axis=1))


@pytest.mark.parametrize("shape", [[1], [3], [4], [5], [2, 3, 7], [3, 5, 5]])
def test_elements_are_numbered_row_by_row(shape: list[int]) -> None:
    """Element i is the same number in every shape, sizes that do not divide by four included."""
    count = int(np.prod(shape))
    longest = gaussian_noise([11], 2, [128])[0]
    np.testing.assert_array_equal(gaussian_noise([11], 2, shape)[0].ravel(), longest[:count])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(FewstepError, match=f"seed {seed} is out of range"):
        gaussian_noise([0, seed], 0, [4])
