"""Heun's rule (Karras et al. 2022, arXiv 2206.00364, algorithm 1), deterministic."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Condition, DenoiserLike
from .euler import slopes
from .grid import grid


def heun(
    denoiser: DenoiserLike, x_t: Tensor, times: Sequence[float], condition: Condition, noise: Callable[[int], Tensor]
) -> Tensor:
    """Second-order solver of the probability flow: Euler's step, repeated with the mean slope of its two ends.

    Draws no noise. Written on `dx = x_0 d(alpha) + eps d(sigma)` as `euler` is; with EDM's `alpha = 1` it is the
    paper's rule in sigma. The step to `t = 0` stays Euler's, so that K steps ending there cost 2 K - 1 evaluations.

    Arguments and result are those of `SamplerFunction`.
    """
    for here, there in pairwise(grid(denoiser.schedule, times)):
        d_alpha, d_sigma = there.alpha - here.alpha, there.sigma - here.sigma
        x_0, eps = slopes(denoiser, x_t, here, condition)
        x_s = x_t + d_alpha * x_0 + d_sigma * eps
        if not there.clean:
            x_0_s, eps_s = slopes(denoiser, x_s, there, condition)
            x_s = x_t + d_alpha * (x_0 + x_0_s) / 2 + d_sigma * (eps + eps_s) / 2
        x_t = x_s
    return x_t
