"""One step of a sampler in one pass over memory: guidance, conversion to `x_0`, the update and its fresh noise.

Guidance, every prediction type and the steps of DDIM, Euler and consistency sampling are affine in `x_t`, the network's
raw outputs and the noise, so that a whole step is `x_s = a x_t + b out_c + c out_u + d z` with four numbers, which the
host works out in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .dispatch import runs_triton
from .philox import gaussian_noise_reference

Level = tuple[float, float]
"""`(alpha, sigma)` of `x_t = alpha x_0 + sigma eps`; the clean one is `(1, 0)`."""

SAMPLE_WEIGHTS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
    "sample": lambda alpha, sigma: (0.0, 1.0),
    "flow_prediction": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
}
"""The weights of `x_t` and of a network's output in `x_0`, by diffusers' name of the prediction type.

An epsilon-prediction says nothing of `x_0` in pure noise: `ZeroDivisionError` where `alpha = 0`.
"""


@dataclass(frozen=True)
class Coefficients:
    """What a step multiplies; of one step for a whole batch.

    Args:
        x_t: of the samples.
        conditional: of the network's output for the condition.
        unconditional: of its output for the negative condition; 0 without guidance.
        noise: of the fresh noise; 0 for a step that draws none.
    """

    x_t: float
    conditional: float
    unconditional: float = 0.0
    noise: float = 0.0

    @classmethod
    def ddim(cls, prediction: str, here: Level, there: Level, guidance: float = 1.0) -> Self:
        """Keep the predicted noise (arXiv 2010.02502, eq. 12): `x_s = alpha_s x_0 + sigma_s eps`; Euler's step too.

        Args:
            prediction: a key of `SAMPLE_WEIGHTS`.
            here: any level but the clean one.
            there: a lower noise level; at the clean one the result is `x_0`.
            guidance: scale of classifier-free guidance (arXiv 2207.12598), 1 for none.
        """
        ratio = there[1] / here[1]
        return cls._of(prediction, here, guidance, x_t=ratio, x_0=there[0] - ratio * here[0])

    @classmethod
    def consistency(cls, prediction: str, here: Level, there: Level, guidance: float = 1.0) -> Self:
        """Noise the predicted sample afresh (arXiv 2303.01469, algorithm 1): `x_s = alpha_s x_0 + sigma_s z`.

        Arguments are those of `ddim`.
        """
        return cls._of(prediction, here, guidance, x_0=there[0], noise=there[1])

    @classmethod
    def _of(
        cls, prediction: str, here: Level, guidance: float, x_0: float, x_t: float = 0.0, noise: float = 0.0
    ) -> Self:
        skip, out = SAMPLE_WEIGHTS[prediction](*here)
        return cls(x_t + x_0 * skip, x_0 * out * guidance, x_0 * out * (1 - guidance), noise)


@torch.no_grad()
def sampler_step(
    x_t: Tensor, output: Tensor, coefficients: Coefficients, seeds: Tensor | None = None, step: int = 0
) -> Tensor:
    """Take a step of a sampler, outside autograd.

    Args:
        x_t: (B, ...) samples.
        output: the network's raw output, shaped as `x_t`; or (2B, ...) with the unconditional half first, for guidance.
        coefficients: of the step.
        seeds: (B,) int64 as `pack_seeds` gives them, for a step that draws noise.
        step: which draw it is, in [0, 2^31): k before step k; the noise is that of `gaussian_noise(seeds, step, ...)`.

    Returns:
        (B, ...) in the dtype of `x_t`, contiguous.

    Raises:
        ValueError: the output has another batch than the coefficients ask for, or there are no seeds for the noise.
    """
    _check(x_t, output, coefficients, seeds)
    if runs_triton(x_t, output, seeds):
        from .sampler_step_triton import launch

        return launch(x_t, output, coefficients, seeds, step)
    return sampler_step_reference(x_t, output, coefficients, seeds, step)


def _check(x_t: Tensor, output: Tensor, coefficients: Coefficients, seeds: Tensor | None) -> None:
    single, doubled = tuple(x_t.shape), (2 * len(x_t), *x_t.shape[1:])
    if output.shape not in ((doubled,) if coefficients.unconditional else (single, doubled)):
        wanted = doubled if coefficients.unconditional else single
        raise ValueError(f"this step needs a network output of shape {wanted}: got {tuple(output.shape)}")
    if coefficients.noise and (seeds is None or len(seeds) != len(x_t)):
        raise ValueError(f"this step draws noise: give {len(x_t)} seeds, one a sample")


def sampler_step_reference(
    x_t: Tensor, output: Tensor, coefficients: Coefficients, seeds: Tensor | None = None, step: int = 0
) -> Tensor:
    """The same in plain torch; half precision is computed in float32."""
    wide = torch.promote_types(x_t.dtype, torch.float32)
    x_s = coefficients.x_t * x_t.to(wide) + coefficients.conditional * output[-len(x_t) :].to(wide)
    if coefficients.unconditional:
        x_s = x_s + coefficients.unconditional * output[: len(x_t)].to(wide)
    if coefficients.noise and seeds is not None:
        x_s = x_s + coefficients.noise * gaussian_noise_reference(seeds, step, x_t.shape[1:]).to(wide)
    return x_s.to(x_t.dtype).contiguous()
