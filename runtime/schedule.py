"""Noise schedules: how much of the clean sample and how much noise `x_t` holds.

Every process is `x_t = alpha(t) * x_0 + sigma(t) * eps` with one unit of time for all of them: `t` in [0, 1], where
`t = 0` is the clean sample (`alpha = 1`, `sigma = 0` exactly) and `t = 1` the noisiest level the network was trained
on. `network_time` turns `t` into the number that the network itself was trained with (0..999, an angle, a log-sigma),
and only denoisers call it.

All functions are elementwise, keep the dtype and device of `t`, and need no float64.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import FewstepError


class Schedule(Protocol):
    """What samplers and methods know of a noise process; every argument and result has the shape of `t`."""

    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the clean sample."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""
        ...

    def d_alpha(self, t: Tensor) -> Tensor:
        """Time derivative of `alpha`."""
        ...

    def d_sigma(self, t: Tensor) -> Tensor:
        """Time derivative of `sigma`; may be infinite at `t = 0`."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """The time embedding input that the network was trained with."""
        ...

    def input_scale(self, t: Tensor) -> Tensor:
        """What `x_t` is multiplied by before the network sees it."""
        ...


@dataclass(frozen=True, eq=False)
class VP:
    """Variance-preserving process of discrete betas (DDPM, arXiv 2006.11239), as diffusers' schedulers hold them.

    Training step `k` of `N` sits at `t = (k + 1) / N`; between the steps `log alpha` is linear in `t`.

    Args:
        alphas_cumprod: (N,) cumulative products of `1 - beta`, in (0, 1], decreasing. A final zero (zero terminal
            SNR) is kept at `2^-24`.
    """

    alphas_cumprod: Tensor
    _knots: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def _knots_for(self, t: Tensor) -> Tensor:
        """`log alpha` at every training step, copied to a device only once: a copy makes the host wait for it."""
        knots = self._knots.get((t.device, t.dtype))
        if knots is None:
            steps = 0.5 * self.alphas_cumprod.double().clamp_min(2.0**-24).log()
            knots = torch.cat([torch.zeros_like(steps[:1]), steps]).to(t)
            if type(knots) is Tensor:  # not the stand-in of an export's trace
                self._knots[t.device, t.dtype] = knots
        return knots

    def _log_alpha_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        knots = self._knots_for(t)
        position = t * (len(knots) - 1)
        left = position.floor().clamp(0, len(knots) - 2).long()
        slope = knots[left + 1] - knots[left]
        return knots[left] + slope * (position - left), slope * (len(knots) - 1)

    def alpha(self, t: Tensor) -> Tensor:
        """`sqrt(alphas_cumprod)`."""
        return self._log_alpha_and_slope(t)[0].exp()

    def sigma(self, t: Tensor) -> Tensor:
        """`sqrt(1 - alphas_cumprod)`."""
        return (-torch.expm1(2 * self._log_alpha_and_slope(t)[0])).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        """Time derivative of `alpha`."""
        log_alpha, slope = self._log_alpha_and_slope(t)
        return log_alpha.exp() * slope

    def d_sigma(self, t: Tensor) -> Tensor:
        """Time derivative of `sigma`; infinite at `t = 0`."""
        log_alpha, slope = self._log_alpha_and_slope(t)
        return -(2 * log_alpha).exp() * slope / (-torch.expm1(2 * log_alpha)).sqrt()

    def network_time(self, t: Tensor) -> Tensor:
        """Training step index, 0 to N - 1 (fractions lie between two steps)."""
        return (t * len(self.alphas_cumprod) - 1).clamp_min(0)

    def input_scale(self, t: Tensor) -> Tensor:
        """One: VP networks see `x_t` itself."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class Flow:
    """Straight-line process of rectified flow and flow matching (arXiv 2209.03003): `alpha = 1 - s`, `sigma = s`.

    Args:
        shift: `s = shift * t / (1 + (shift - 1) * t)` (Stable Diffusion 3, arXiv 2403.03206, eq. 23); 1 leaves time
            alone.
        train_steps: the network's own time is `train_steps * s`.
    """

    shift: float = 1.0
    train_steps: int = 1000

    def alpha(self, t: Tensor) -> Tensor:
        """`1 - s`."""
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The shifted time `s`."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """Minus the derivative of `sigma`."""
        return -self.d_sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """`ds/dt`."""
        return self.shift / (1 + (self.shift - 1) * t) ** 2

    def network_time(self, t: Tensor) -> Tensor:
        """`train_steps * s`, 0 to 1000 in diffusers' models."""
        return self.train_steps * self.sigma(t)

    def input_scale(self, t: Tensor) -> Tensor:
        """One: flow networks see `x_t` itself."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class EDM:
    """Variance-exploding process with EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364): `alpha = 1`.

    `sigma = sigma_max * t ** rho`, so that a uniform grid in `t` is Karras' own spacing and ends at exactly 0.
    """

    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    def alpha(self, t: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level, 0 to `sigma_max`."""
        return self.sigma_max * t**self.rho

    def d_alpha(self, t: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """`dsigma/dt`."""
        return self.sigma_max * self.rho * t ** (self.rho - 1)

    def network_time(self, t: Tensor) -> Tensor:
        """`c_noise = ln(sigma) / 4` (table 1)."""
        return self.sigma(t).log() / 4

    def input_scale(self, t: Tensor) -> Tensor:
        """`c_in = 1 / sqrt(sigma^2 + sigma_data^2)` (table 1)."""
        return (self.sigma(t) ** 2 + self.sigma_data**2).rsqrt()


@dataclass(frozen=True)
class Trig:
    """Trigonometric process of sCM's TrigFlow (arXiv 2410.11081): `alpha = cos a`, `sigma = sin a`, `a = pi/2 * t`."""

    def alpha(self, t: Tensor) -> Tensor:
        """`cos a`."""
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """`sin a`."""
        return torch.sin(math.pi / 2 * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """`-pi/2 sin a`."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """`pi/2 cos a`."""
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def network_time(self, t: Tensor) -> Tensor:
        """The angle `a` in radians."""
        return math.pi / 2 * t

    def input_scale(self, t: Tensor) -> Tensor:
        """One: TrigFlow networks see `x_t` itself (data scaled to unit variance)."""
        return torch.ones_like(t)


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Build the schedule that a diffusers scheduler's config describes.

    Args:
        config: the parsed `scheduler_config.json`; `scheduler.config` in memory does not name its class.

    Raises:
        FewstepError: the config does not name its class, or it is of a process that is none of these.
    """
    name = _class_name(config)
    if name.startswith("FlowMatch"):
        return Flow(shift=config.get("shift", 1.0), train_steps=config.get("num_train_timesteps", 1000))
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return Flow(shift=config.get("flow_shift", 1.0), train_steps=config.get("num_train_timesteps", 1000))
    if name.startswith("EDM"):
        return EDM(
            sigma_max=config.get("sigma_max", 80.0),
            sigma_data=config.get("sigma_data", 0.5),
            rho=config.get("rho", 7.0),
        )
    if name.startswith(("SCM", "TrigFlow")):
        return Trig()
    if "beta_schedule" not in config:
        raise FewstepError(f"{name} is of no known noise process: use a DDIM, flow-matching, EDM or SCM scheduler")
    from diffusers import DDIMScheduler  # its betas are the reference for every VP config

    return VP(DDIMScheduler.from_config(dict(config)).alphas_cumprod)


def prediction_from_config(config: Mapping[str, Any]) -> str:
    """Name the quantity that a network with this diffusers scheduler config predicts: a `Denoiser.prediction`.

    Raises:
        FewstepError: the config does not name its class, or the network is preconditioned in another way than EDM's.
    """
    name = _class_name(config)
    if name.startswith("FlowMatch"):
        return "flow_prediction"
    if name.startswith("EDM"):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise FewstepError(f"{name} with prediction type {config['prediction_type']} is not supported: use epsilon")
        return "edm"
    if name.startswith(("SCM", "TrigFlow")):
        return "v_prediction"
    return str(config.get("prediction_type", "epsilon"))


def _class_name(config: Mapping[str, Any]) -> str:
    if "_class_name" not in config:
        raise FewstepError("the scheduler config does not name its class: give the parsed scheduler_config.json")
    return str(config["_class_name"])


def uniform_times(steps: int, start: float = 1.0) -> list[float]:
    """`steps + 1` times, evenly spaced from `start` down to exactly 0; fine for one step.

    Args:
        steps: network evaluations, at least 1.
        start: first time, in (0, 1].
    """
    return [start * (steps - index) / steps for index in range(steps)] + [0.0]
