"""Euler's rule on the probability-flow equation `dx = x_0 d(alpha) + eps d(sigma)`.

The increments of alpha and sigma are taken whole, not as derivatives times `dt`, so a step depends only on the levels
it joins and not on how time is measured between them. It is Euler's rule in sigma for flows of any shift (Liu et al.
2022, arXiv 2209.03003) and for EDM (Karras et al. 2022, arXiv 2206.00364). Multiplied out, it is DDIM.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Condition, DenoiserLike
from ..prediction import sample_to_epsilon
from .grid import Level, grid


def slopes(denoiser: DenoiserLike, x_t: Tensor, here: Level, condition: Condition) -> tuple[Tensor, Tensor]:
    """`dx/d(alpha)` and `dx/d(sigma)` of the probability flow: the predicted clean sample and noise, (B, ...) each."""
    x_0 = denoiser(x_t, here.t, condition)
    return x_0, sample_to_epsilon(x_0, x_t, here.alpha, here.sigma)


def euler(
    denoiser: DenoiserLike, x_t: Tensor, times: Sequence[float], condition: Condition, noise: Callable[[int], Tensor]
) -> Tensor:
    """First-order solver of the probability flow; draws no noise.

    Arguments and result are those of `SamplerFunction`.
    """
    for here, there in pairwise(grid(denoiser.schedule, times)):
        x_0, eps = slopes(denoiser, x_t, here, condition)
        x_t = x_t + (there.alpha - here.alpha) * x_0 + (there.sigma - here.sigma) * eps
    return x_t
