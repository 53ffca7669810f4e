"""DDIM (Song et al. 2021, arXiv 2010.02502), deterministic, in (alpha, sigma) form."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Condition, DenoiserLike
from .grid import Level, grid


def ddim_step(x_t: Tensor, x_0: Tensor, here: Level, there: Level) -> Tensor:
    """Keep the predicted noise and change its level (eq. 12 with no fresh noise): `x_s = alpha_s x_0 + sigma_s eps`.

    Args:
        x_t: (B, ...) samples at `here`.
        x_0: (B, ...) their predicted clean samples.
        here: any level but the clean one.
        there: a lower noise level; at the clean one the result is `x_0`.
    """
    ratio = there.sigma / here.sigma
    return ratio * x_t + (there.alpha - ratio * here.alpha) * x_0


def ddim(
    denoiser: DenoiserLike, x_t: Tensor, times: Sequence[float], condition: Condition, noise: Callable[[int], Tensor]
) -> Tensor:
    """First-order solver of the probability flow that holds `x_0` over each step; draws no noise.

    Arguments and result are those of `SamplerFunction`.
    """
    for here, there in pairwise(grid(denoiser.schedule, times)):
        x_t = ddim_step(x_t, denoiser(x_t, here.t, condition), here, there)
    return x_t
