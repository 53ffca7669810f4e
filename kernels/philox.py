"""Counter-based noise made where it is used: the numbers of `runtime/noise.py`, on any device.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key = seed and counter =
(element, step), then Box-Muller in float64, rounded once to float32.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import runs_triton

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def gaussian_noise(seeds: Sequence[int], step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal noise, one image per seed, whatever the batch or the device.

    Args:
        seeds: B seeds, each in [0, 2^64).
        step: which draw of the trajectory, in [0, 2^31): 0 is the initial noise, k the re-noising before step k.
        shape: of one image's noise.
        device: where it is made.

    Returns:
        (B, *shape) float32.

    Raises:
        ValueError: a seed is out of range.
    """
    packed = pack_seeds(seeds, device)
    if runs_triton(packed):
        from .philox_triton import launch

        return launch(packed, step, shape)
    return gaussian_noise_reference(packed, step, shape)


def pack_seeds(seeds: Sequence[int], device: torch.device | str) -> Tensor:
    """(B,) int64 on a device: torch computes with no unsigned 64-bit integers, so the bits of each seed, as signed.

    Raises:
        ValueError: a seed lies outside [0, 2^64).
    """
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is out of range: use a whole number from 0 to 2^64 - 1")
    return torch.tensor([seed - (seed >> 63 << 64) for seed in seeds], dtype=torch.int64, device=device)


def gaussian_noise_reference(seeds: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """The same in plain torch, for seeds (B,) as `pack_seeds` gives them."""
    size = math.prod(shape)
    element = torch.arange((size + 3) // 4, device=seeds.device)
    key = seeds[:, None]
    words = philox((element & _LOW, element >> 32, element * 0 + step, element * 0), (key & _LOW, key >> 32 & _LOW))
    uniform = [(word.double() + 0.5) * 2.0**-32 for word in words]
    normal = []
    for first, second in (uniform[:2], uniform[2:]):
        radius, angle = (-2 * first.log()).sqrt(), 2 * torch.pi * second
        normal += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normal, dim=-1).flatten(1)[:, :size].float().reshape(len(seeds), *shape)


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four int64 tensors of 32-bit words.
        key: two int64 tensors of 32-bit words, that broadcast against the counter's.

    Returns:
        Four int64 tensors of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of 32-bit words, which signed 64 bits cannot hold: by halves of the word."""
    lower = (word & 0xFFFF) * multiplier
    upper = (word >> 16) * multiplier + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF
