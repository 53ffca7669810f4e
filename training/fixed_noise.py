"""Samples at noise that depends on their numbers only, so that two looks at a student in training can be compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.denoiser import Condition, DenoiserLike, initial_scale
from ..runtime.noise import gaussian_noise
from ..runtime.samplers import get_sampler


def sample_at_fixed_noise(
    denoiser: DenoiserLike,
    sampler: str,
    times: Sequence[float],
    condition: Condition,
    seeds: range,
    shape: Sequence[int],
    device: torch.device,
    guidance: float | None = None,
) -> Tensor:
    """Sample, with the noise that `fewstep generate` draws for the same seeds.

    Args:
        denoiser: a teacher or a student.
        sampler: a name in `runtime.samplers.SAMPLERS`.
        times: from 1 down to 0.
        condition: of each sample.
        seeds: one a sample.
        shape: (C, ...) of a sample.
        device: where the denoiser is.
        guidance: for a denoiser that takes the scale as an input.

    Returns:
        x_0 (B, C, ...), float32.
    """
    if guidance is not None:
        condition = {**condition, "guidance": torch.full((len(seeds),), guidance, device=device)}

    def noise(step: int) -> Tensor:
        return torch.from_numpy(gaussian_noise(seeds, step, tuple(shape))).to(device)

    x_T = initial_scale(denoiser.schedule, times[0]) * noise(0)
    return get_sampler(sampler).function(denoiser, x_T, times, condition, noise).float()
