"""SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), with adjustable noise."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Condition, DenoiserLike
from .dpm_solver import extrapolate
from .grid import Level, grid


def sde_step(x_t: Tensor, x_0: Tensor, z: Tensor, here: Level, there: Level, eta: float) -> Tensor:
    """Replace part of the predicted noise by fresh noise.

    `x_s = alpha_s x_0 + sigma_s (e^{-eta h} eps + sqrt(1 - e^{-2 eta h}) z)`, where `h` is the step in log-SNR. Exact
    for a constant `x_0`; with `eta = 0` it is DDIM's step.

    Args:
        x_t: (B, ...) samples at `here`.
        x_0: (B, ...) their predicted clean samples.
        z: (B, ...) standard normal.
        here: any level but the clean one.
        there: a lower noise level; at the clean one the result is `x_0`.
        eta: 0 for the probability flow, 1 for the reverse of the diffusion itself.
    """
    kept = (here.alpha * there.sigma / (there.alpha * here.sigma)) ** eta
    ratio = kept * there.sigma / here.sigma
    return ratio * x_t + (there.alpha - ratio * here.alpha) * x_0 + there.sigma * (1 - kept**2).sqrt() * z


def sde_dpm_solver(
    denoiser: DenoiserLike,
    x_t: Tensor,
    times: Sequence[float],
    condition: Condition,
    noise: Callable[[int], Tensor],
    eta: float = 1.0,
) -> Tensor:
    """Multistep solver of the reverse diffusion; its order is that of the distribution it gives.

    Arguments and result are those of `SamplerFunction`; `eta` is the strength of the fresh noise: 0 gives
    DPM-Solver++(2M), 1 the reverse of the diffusion itself.
    """
    last: tuple[Tensor, Level] | None = None
    for k, (here, there) in enumerate(pairwise(grid(denoiser.schedule, times)), start=1):
        x_0 = denoiser(x_t, here.t, condition)
        if there.clean:
            return x_0
        middle = x_0 if last is None else extrapolate(x_0, *last, here, there)
        x_t = sde_step(x_t, middle, noise(k), here, there, eta)
        last = x_0, here
    return x_t
