"""Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Condition, DenoiserLike
from .grid import grid


def consistency(
    denoiser: DenoiserLike, x_t: Tensor, times: Sequence[float], condition: Condition, noise: Callable[[int], Tensor]
) -> Tensor:
    """Jump to the clean sample and noise it afresh to the next level: `x_s = alpha_s x_0 + sigma_s z`.

    Made for students that predict the end of the trajectory; it does not solve the flow of an ordinary denoiser.

    Arguments and result are those of `SamplerFunction`.
    """
    for k, (here, there) in enumerate(pairwise(grid(denoiser.schedule, times)), start=1):
        x_0 = denoiser(x_t, here.t, condition)
        x_t = x_0 if there.clean else there.alpha * x_0 + there.sigma * noise(k)
    return x_t
