"""A panel of predictions to watch a stage by: where the networks that teach one another agree, and where not."""

from pathlib import Path

import torch

from ..runtime.denoiser import add_noise
from ..runtime.noise import gaussian_noise
from .fixed_noise import sample_at_fixed_noise
from .latents import LatentData, decode_latents
from .method import Stage, Task
from .picture import save_rows

COUNT = 8
"""Samples in a row."""
NOISE_LEVELS = (0.25, 0.5, 0.75)
"""Times t to which the student's samples are noised."""


@torch.inference_mode()
def show_predictions(stage: Stage, task: Task, data: LatentData, path: Path) -> None:
    """Write the student's samples, and under them the `x_0` that each network predicts of these samples once noised.

    At every noise level there is one row for the guided teacher and one for each denoiser in `stage.panel`. Prompts and
    noise are always the same, and no random number of the training is drawn.
    """
    _, condition = data.spread(COUNT)
    shape, seeds, device = task.sample_shape, range(COUNT), task.device
    scale = stage.guidance if stage.guidance_range else None
    student = stage.student.denoiser
    x = sample_at_fixed_noise(student, stage.sampler, stage.times, condition, seeds, shape, device, scale)
    eps = torch.from_numpy(gaussian_noise(seeds, len(stage.times), shape)).to(device)  # the sampler draws fewer

    told = condition if scale is None else {**condition, "guidance": torch.full((COUNT,), scale, device=device)}
    networks = {"teacher": (task.guided(stage.guidance), condition)}
    networks |= {name: (denoiser, told) for name, denoiser in (stage.panel or {"student": student}).items()}
    rows = {"samples": x}
    for t in map(torch.tensor, NOISE_LEVELS):
        x_t = add_noise(student.schedule, x, eps, t)
        rows |= {f"{name}, t = {t:g}": denoiser(x_t, t, given) for name, (denoiser, given) in networks.items()}
    save_rows({name: decode_latents(data.decoder, row.float(), device) * 2 - 1 for name, row in rows.items()}, path)
