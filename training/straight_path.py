"""Any noise process as a rectified flow: the straight paths that DDIM's and Euler's steps follow.

A network of any process is the velocity field of a flow `y_s = (1 - s) x_0 + s z` once its times are matched by
signal-to-noise ratio (arXiv 2405.20320): at the time t with `a(t) / b(t) = (1 - s) / s` it is shown
`x_t = a x_0 + b z = (a + b) y_s`, and its `x_0` is that of the flow. Euler's steps in s and DDIM's in t are then the
same, so a student keeps its schedule, its parameterisation and its sampler; only its times are chosen even in s.

Samplers start from `x_T = initial_scale z`, while a process may still hold data at t = 1 (`alpha(1) > 0`). The levels
are therefore measured from `x_T`: `b` is `sigma` rescaled to begin there, and `a(1) = 0`.
Shapes: samples x (B, ...), times () or (B,).
"""

import torch
from torch import Tensor

from ..runtime.denoiser import broadcast, initial_scale
from ..runtime.samplers.grid import Level
from ..runtime.schedule import Schedule

_SECTIONS, _ROUNDS = 32, 6


def to_flow_time(schedule: Schedule, t: Tensor) -> Tensor:
    """The flow's time `s = b / (a + b)` in [0, 1] at the process' time t; the same as t for a flow without shift."""
    kept, signal = _kept_and_signal(schedule, t)
    b = kept * initial_scale(schedule, 1.0)
    return b / (signal + b)


def from_flow_time(schedule: Schedule, s: Tensor) -> Tensor:
    """The process' time t at the flow's time s, to 1e-9: the bracket is divided by _SECTIONS in each round.

    Every schedule's signal-to-noise ratio is monotonic. The search is in float64, and where s is: no GPU is waited for.
    """
    target = s.double().unsqueeze(-1)
    low, width = torch.zeros_like(target), 1.0
    fractions = torch.arange(1, _SECTIONS, dtype=torch.float64, device=s.device) / _SECTIONS
    for _ in range(_ROUNDS):
        below = to_flow_time(schedule, low + width * fractions) < target
        width /= _SECTIONS
        low = low + width * below.sum(-1, keepdim=True)
    return (low + width).squeeze(-1).to(s)


def flow_times(schedule: Schedule, steps: int) -> tuple[float, ...]:
    """`steps + 1` times of the process from 1 down to 0, even in the flow's time."""
    between = 1 - torch.arange(1, steps, dtype=torch.float64) / steps
    return (1.0, *from_flow_time(schedule, between).tolist(), 0.0)


def straight_point(schedule: Schedule, x_0: Tensor, x_T: Tensor, t: Tensor) -> Tensor:
    """The point at t of the straight path from `x_T` to `x_0`: `y_s = (1 - s) x_0 + s z` in the process' scale.

    It is where DDIM's step from `x_T` lands if `x_0` is what the network predicts there.
    """
    kept, signal = _kept_and_signal(schedule, t)
    return broadcast(kept, x_0) * x_T + broadcast(signal, x_0) * x_0


def velocity_difference(schedule: Schedule, predicted: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """The difference (B, ...) of two flow velocities `(y_s - x_0) / s` at one point, from their clean samples."""
    return (x_0 - predicted) / broadcast(to_flow_time(schedule, t), x_0)


def landing_sample(x_t: Tensor, x_s: Tensor, here: Level, there: Level) -> Tensor:
    """The clean sample whose DDIM step leads from `x_t` to `x_s` (arXiv 2202.00512, algorithm 2).

    Args:
        x_t: (B, ...) samples at `here`.
        x_s: (B, ...) samples at `there`.
        here: any level but the clean one.
        there: a lower noise level; at the clean one the result is `x_s`.
    """
    ratio = there.sigma / here.sigma
    return (x_s - ratio * x_t) / (there.alpha - ratio * here.alpha)


def _kept_and_signal(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of `x_T` at t, and what has come of `x_0`."""
    start = torch.ones((), dtype=t.dtype)  # on the CPU: torch treats it as a number
    kept = schedule.sigma(t) / schedule.sigma(start)
    return kept, schedule.alpha(t) - kept * schedule.alpha(start)
