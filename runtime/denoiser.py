"""Denoisers: the form in which samplers, methods and exports see a network, `denoiser(x_t, t, condition) -> x_0`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .prediction import FROM_SAMPLE, TO_SAMPLE, edm_to_sample, sample_to_edm
from .schedule import EDM, Schedule

Condition = Mapping[str, Tensor]
"""What steers the network, by the name of its input; every tensor has the batch first. May be empty."""

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""`network(x, network_time, condition)`: x (B, ...), network_time (B,), output shaped as x."""


class DenoiserLike(Protocol):
    """Anything that predicts `x_0`: a wrapped network, a guided one, an analytic teacher in a test."""

    @property
    def schedule(self) -> Schedule:
        """The noise process of `x_t`."""
        ...

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the clean sample.

        Args:
            x_t: (B, ...) noisy samples.
            t: () or (B,) times in (0, 1].
            condition: tensors with B first.
        """
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network with its schedule and prediction type.

    Args:
        network: the raw call; its output is what `prediction` names.
        schedule: the process it was trained on.
        prediction: a key of `prediction.TO_SAMPLE`, or `edm` (with an `EDM` schedule).
    """

    network: Network
    schedule: Schedule
    prediction: str

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict `x_0` of shape (B, ...) from `x_t` at `t`, () or (B,)."""
        output = self.network(*self.network_input(x_t, t), condition)
        return self.to_sample(output, x_t, t)

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled `x_t` and the (B,) time in the network's unit, in float32 at least: bfloat16 rounds 999 to 1000."""
        network_time, wide = self.schedule.network_time(t), torch.promote_types(x_t.dtype, torch.float32)
        if network_time.ndim == 0:  # added as a number: a copy to a GPU would wait for it, and cannot be captured
            network_time = x_t.new_zeros(x_t.shape[0], dtype=wide) + network_time
        network_time = network_time.to(x_t.device, wide).expand(x_t.shape[0])
        return x_t * broadcast(self.schedule.input_scale(t), x_t), network_time

    def to_sample(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn the network's raw output into `x_0`."""
        alpha, sigma = levels(self.schedule, t, x_t)
        if self.prediction == "edm" and isinstance(self.schedule, EDM):
            return edm_to_sample(output, x_t, sigma, self.schedule.sigma_data)
        return TO_SAMPLE[self.prediction](output, x_t, alpha, sigma)

    def from_sample(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The raw output that `to_sample` turns into `x_0`: what training regresses; undefined where `sigma = 0`."""
        alpha, sigma = levels(self.schedule, t, x_t)
        if self.prediction == "edm" and isinstance(self.schedule, EDM):
            return sample_to_edm(x_0, x_t, sigma, self.schedule.sigma_data)
        return FROM_SAMPLE[self.prediction](x_0, x_t, alpha, sigma)


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance on `x_0` (Ho and Salimans 2022, arXiv 2207.12598): `x_u + scale * (x_c - x_u)`.

    Both predictions come from one call on a doubled batch. Because `x_0` is affine in every prediction type, guiding
    it equals guiding the network's raw output.

    Args:
        denoiser: the conditional denoiser.
        scale: 1 is no guidance (use the plain denoiser then), larger follows the condition more closely; a (B,) tensor
            gives each sample its own.
        negative: condition of the unconditional prediction, shaped as the condition or with batch 1.
    """

    denoiser: DenoiserLike
    scale: float | Tensor
    negative: Condition

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's process."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the guided `x_0`."""
        both = {
            name: torch.cat([self.negative[name].to(value).expand_as(value), value])
            for name, value in condition.items()
        }
        doubled_time = torch.cat([t, t]) if t.ndim else t
        unconditional, conditional = self.denoiser(torch.cat([x_t, x_t]), doubled_time, both).chunk(2)
        scale = broadcast(self.scale, x_t) if isinstance(self.scale, Tensor) else self.scale
        return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class WatchedDenoiser:
    """A denoiser that shows each of its predictions to somebody.

    Args:
        denoiser: what predicts.
        watch: called with every `x_0`.
    """

    denoiser: DenoiserLike
    watch: Callable[[Tensor], object]

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's process."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict `x_0`, and show it."""
        x_0 = self.denoiser(x_t, t, condition)
        self.watch(x_0)
        return x_0


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """Shape a () or (B,) value so that it multiplies x (B, ...).

    A 0-dimensional CPU tensor is left alone: torch treats it as a number, so it neither promotes the dtype of x nor
    waits for a GPU.
    """
    return value.reshape(-1, *[1] * (x.ndim - 1)).to(x) if value.ndim else value


def levels(schedule: Schedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`alpha(t)` and `sigma(t)`, ready to multiply x."""
    return broadcast(schedule.alpha(t), x), broadcast(schedule.sigma(t), x)


def add_noise(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """`x_t = alpha(t) x_0 + sigma(t) eps`."""
    alpha, sigma = levels(schedule, t, x_0)
    return alpha * x_0 + sigma * eps


def initial_scale(schedule: Schedule, t: float) -> float:
    """What standard normal noise is multiplied by to make `x_T` at the first time of a trajectory.

    Only the variance of `x_T` matters: 1 for variance-preserving processes and flows, `sigma_max^2 + 1` for EDM.
    """
    start = torch.tensor(t, dtype=torch.float64)
    return math.hypot(float(schedule.alpha(start)), float(schedule.sigma(start)))
