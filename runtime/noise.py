"""Counter-based noise: one seed gives one image, whatever the batch, the engine or the device.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key = seed and counter =
(element, step), then Box-Muller. Element i of image noise depends on nothing but (seed, step, i), so that
`kernels/philox.py` makes the same numbers on a GPU, in place.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import FewstepError

Words = npt.NDArray[np.uint64]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four arrays of one shape, each holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four arrays of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
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
    return np.stack([_gaussian(seed, step, shape) for seed in seeds])


def _gaussian(seed: int, step: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    if not 0 <= seed < 2**64:
        raise FewstepError(f"seed {seed} is out of range: use a whole number from 0 to 2^64 - 1")
    count = int(np.prod(shape))
    element = np.arange((count + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(element)
    counter = (element & _LOW, element >> _SHIFT, zero + np.uint64(step), zero)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    uniform = [(word.astype(np.float64) + 0.5) * 2.0**-32 for word in words]
    normal = []
    for first, second in (uniform[:2], uniform[2:]):
        radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
        normal += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(normal, axis=-1).reshape(-1)[:count].reshape(shape).astype(np.float32)
