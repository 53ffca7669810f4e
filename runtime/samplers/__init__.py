"""Samplers: plain functions `sampler(denoiser, x_t, times, condition, noise) -> x_s`, and their registry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

from torch import Tensor

from ..denoiser import Condition, DenoiserLike
from ..errors import FewstepError
from .consistency import consistency
from .ddim import ddim
from .dpm_solver import dpm_solver
from .euler import euler
from .heun import heun
from .sde_dpm_solver import sde_dpm_solver


class SamplerFunction(Protocol):
    """The one signature of all samplers."""

    def __call__(
        self,
        denoiser: DenoiserLike,
        x_t: Tensor,
        times: Sequence[float],
        condition: Condition,
        noise: Callable[[int], Tensor],
    ) -> Tensor:
        """Take `len(times) - 1` steps.

        Args:
            denoiser: predicts `x_0`.
            x_t: (B, ...) samples at `times[0]`.
            times: `steps + 1` times, strictly decreasing in [0, 1]; usually the last is 0.
            condition: what steers the denoiser.
            noise: `noise(k)`, k >= 1, is standard normal like `x_t`, for the re-noising that precedes step k.

        Returns:
            (B, ...) samples at `times[-1]`.

        Raises:
            FewstepError: `times` do not fall strictly within [0, 1].
        """
        ...


@dataclass(frozen=True)
class Sampler:
    """A sampler and what it costs.

    Args:
        function: takes the steps.
        order: power of the step with which the error falls: that of the trajectory, or of the distribution for a
            stochastic solver; 0 marks a sampler that solves no equation.
        stochastic: whether it draws noise between steps.
        evaluations_per_step: network evaluations of each step but the last, which takes one.
    """

    function: SamplerFunction
    order: int
    stochastic: bool = False
    evaluations_per_step: int = 1

    def draws(self, steps: int) -> int:
        """Noise draws of a trajectory down to `t = 0`, the initial one included."""
        return steps if self.stochastic else 1

    def evaluations(self, steps: int) -> int:
        """Network evaluations of a trajectory down to `t = 0`."""
        return self.evaluations_per_step * (steps - 1) + 1


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, order=1),
    "euler": Sampler(euler, order=1),
    "heun": Sampler(heun, order=2, evaluations_per_step=2),
    "dpm++2m": Sampler(dpm_solver, order=2),
    "sde-dpm++2m": Sampler(sde_dpm_solver, order=2, stochastic=True),
    "consistency": Sampler(consistency, order=0, stochastic=True),
}
"""Every sampler by name."""


def get_sampler(name: str) -> Sampler:
    """Look up a sampler.

    Raises:
        FewstepError: there is none of that name.
    """
    if name not in SAMPLERS:
        guess = get_close_matches(name.lower(), SAMPLERS, n=1)
        hint = f": did you mean {guess[0]}?" if guess else ":"
        raise FewstepError(f"there is no sampler {name!r}{hint} the samplers are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
