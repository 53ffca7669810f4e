"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Condition, DenoiserLike
from .ddim import ddim_step
from .grid import Level, grid


def extrapolate(x_0: Tensor, before: Tensor, previous: Level, here: Level, there: Level) -> Tensor:
    """Predict the clean sample of the step's middle (`D_i`), on a line in log-SNR through the last two predictions.

    Args:
        x_0: (B, ...) prediction at `here`.
        before: (B, ...) prediction at `previous`.
        previous: the level before `here`; where it is pure noise the line is flat.
        here: start of the step.
        there: end of the step, not the clean level.
    """
    h, h_before = there.log_snr - here.log_snr, here.log_snr - previous.log_snr
    return x_0 + h / (2 * h_before) * (x_0 - before)


def dpm_solver(
    denoiser: DenoiserLike, x_t: Tensor, times: Sequence[float], condition: Condition, noise: Callable[[int], Tensor]
) -> Tensor:
    """Second-order multistep solver of the probability flow; draws no noise.

    The first step and a step to `t = 0`, which is infinitely long in log-SNR, are first order.

    Arguments and result are those of `SamplerFunction`.
    """
    last: tuple[Tensor, Level] | None = None
    for here, there in pairwise(grid(denoiser.schedule, times)):
        x_0 = denoiser(x_t, here.t, condition)
        middle = x_0 if last is None or there.clean else extrapolate(x_0, *last, here, there)
        x_t = ddim_step(x_t, middle, here, there)
        last = x_0, here
    return x_t
