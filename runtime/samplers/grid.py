"""The noise levels that a sampler visits."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import levels
from ..errors import FewstepError
from ..schedule import Schedule


@dataclass(frozen=True)
class Level:
    """One stop of a trajectory: `x_t = alpha x_0 + sigma eps`.

    Args:
        t: () or (B,) time.
        alpha: coefficient of the clean sample, ready to multiply `x_t`.
        sigma: coefficient of the noise, ready to multiply `x_t`.
        clean: whether this is `t = 0`, where `alpha = 1` and `sigma = 0`; a plain bool, so that samplers which branch
            on it can be exported.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    clean: bool = False

    @property
    def log_snr(self) -> Tensor:
        """`lambda = log(alpha / sigma)`: minus infinity in pure noise, infinity at `t = 0`."""
        return self.alpha.log() - self.sigma.log()


def level(schedule: Schedule, t: Tensor, x: Tensor) -> Level:
    """The level of each sample of x (B, ...) at times t () or (B,)."""
    return Level(t, *levels(schedule, t, x))


def grid(schedule: Schedule, times: Sequence[float]) -> list[Level]:
    """The levels at `times`, their numbers held as () float64 tensors on the CPU.

    Torch treats such a tensor as a number: it takes the dtype and device of the `x_t` it multiplies, and an exported
    graph holds it as a constant.

    Args:
        schedule: the noise process.
        times: at least two, strictly decreasing in [0, 1].

    Raises:
        FewstepError: `times` is not such a list.
    """
    falling = all(t > s for t, s in pairwise(times))
    if len(times) < 2 or not falling or times[0] > 1 or times[-1] < 0:
        raise FewstepError(f"sampling times must fall strictly from at most 1 to at least 0: got {list(times)}")
    tensors = [torch.tensor(time, dtype=torch.float64, device="cpu") for time in times]
    return [
        Level(t, schedule.alpha(t), schedule.sigma(t), clean=time == 0) for t, time in zip(tensors, times, strict=True)
    ]
