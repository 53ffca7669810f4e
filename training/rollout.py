"""How a few-step student produces a sample in training: from noise, as it will in use."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.denoiser import Condition, DenoiserLike, add_noise, initial_scale
from .phase import Draws


def backward_simulation(
    student: DenoiserLike,
    shape: Sequence[int],
    times: Sequence[float],
    condition: Condition,
    draws: Draws,
) -> Tensor:
    """The student's own output at a random one of its steps (DMD2, arXiv 2405.14867, section 4.5).

    The steps before it run without gradient, re-noised freshly in between, so that training sees the inputs of
    inference. All processes train the same step. A one-step student has only index 0.

    Args:
        student: predicts `x_0`; gradients flow through the last call only.
        shape: of the batch, (B, ...).
        times: `steps + 1` times from the noisiest down to 0.
        condition: of the batch.
        draws: the index comes from the shared source, the noise from the own one.

    Returns:
        `x_0` (B, ...), with gradient.
    """
    generator, device = draws.own, draws.own.device
    last = int(torch.randint(len(times) - 1, (), generator=draws.shared))
    x_t = initial_scale(student.schedule, times[0]) * torch.randn(shape, generator=generator, device=device)
    for step in range(last):
        with torch.no_grad():
            x_0 = student(x_t, torch.tensor(times[step]), condition).float()
        eps = torch.randn(shape, generator=generator, device=device)
        x_t = add_noise(student.schedule, x_0, eps, torch.tensor(times[step + 1]))
    return student(x_t, torch.tensor(times[last]), condition).float()
