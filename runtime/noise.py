"""Counter-based noise: one seed gives one image, whatever the batch, the engine or the device.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key = seed and counter =
(element, step), then Box-Muller. Element i of image noise depends on nothing but (seed, step, i), so that
`kernels/philox.py` makes the same numbers on a GPU, in place.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FewstepError

Words = npt.NDArray[np.uint64]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Any, Any]) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four arrays, each holding 32-bit words.
        key: two 32-bit words, or arrays of them; all six broadcast.

    Returns:
        Four arrays of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def gaussian_noise(seeds: Sequence[int], step: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Standard normal noise, one image per seed.

    Args:
        seeds: B seeds, each in [0, 2^64).
        step: which draw of the trajectory: 0 is the initial noise, k the re-noising before step k.
        shape: shape of one image's noise.

    Returns:
        (B, *shape) float32.

    Raises:
        FewstepError: a seed is out of range.
    """
    return _gaussian(seeds, [step], shape)[:, 0]


def trajectory_noise(seeds: Sequence[int], draws: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """All noise of a generation, (B, draws, *shape): `gaussian_noise` of the steps below `draws`, in one buffer.

    Raises:
        FewstepError: a seed is out of range.
    """
    return _gaussian(seeds, range(draws), shape)


def _gaussian(seeds: Sequence[int], steps: Sequence[int], shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """(B, steps, *shape): all images and steps at once, for an image alone is too small to hide what a call costs."""
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise FewstepError(f"seed {seed} is out of range: use a whole number from 0 to 2^64 - 1")
    count = math.prod(shape)
    element = np.arange((count + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(element)
    counter = (element & _LOW, element >> _SHIFT, zero + np.asarray(steps, np.uint64)[:, None], zero)
    key = np.array(seeds, np.uint64)[:, None, None]
    words = philox(counter, (key & _LOW, key >> _SHIFT))
    uniform = [(word.astype(np.float64) + 0.5) * 2.0**-32 for word in words]
    noise = np.empty((len(seeds), len(steps), 4 * len(element)), np.float32)
    for position in (0, 2):
        first, second = uniform[position : position + 2]
        radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
        noise[..., position::4] = radius * np.cos(angle)
        noise[..., position + 1 :: 4] = radius * np.sin(angle)
    return np.ascontiguousarray(noise[..., :count]).reshape(len(seeds), len(steps), *shape)
