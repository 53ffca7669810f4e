"""A whole generation as one module: noise and condition in, image out; and as bytes, which is what engines give.

The torch engine runs it; exports write it as one graph.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .denoiser import Condition, DenoiserLike, GuidedDenoiser, WatchedDenoiser, add_noise, initial_scale
from .families import Model
from .samplers import Sampler


class Trajectory(nn.Module):
    """All network evaluations of one generation, and the decoder.

    Args:
        model: network, decoder and schedule.
        sampler: takes the steps.
        times: `steps + 1` times from the noisiest down to 0.
        guidance: classifier-free guidance scale; 1 leaves the plain denoiser.
        negative: condition (batch 1) of the unconditional prediction, needed when `guidance` is not 1.
        watch: called with the images (B, 3, H, W) in [0, 1] that each evaluation foresees.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        times: Sequence[float],
        guidance: float = 1.0,
        negative: Condition | None = None,
        watch: Callable[[Tensor], object] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.decoder = model.network, model.decoder
        self.sampler, self.times, self.guidance = sampler, tuple(times), guidance
        self.denoiser: DenoiserLike = model.denoiser
        if guidance != 1 and negative is not None:
            self.denoiser = GuidedDenoiser(model.denoiser, guidance, negative)
        if watch is not None:
            self.denoiser = WatchedDenoiser(self.denoiser, lambda x_0: watch(model.decoder(x_0)))
        self.initial_scale = initial_scale(model.denoiser.schedule, self.times[0])

    @property
    def draws(self) -> int:
        """How many noise draws an image takes."""
        return self.sampler.draws(len(self.times) - 1)

    def forward(self, noise: Tensor, latents: Tensor | None = None, **condition: Tensor) -> Tensor:
        """Generate.

        Args:
            noise: (B, draws, C, h, w) standard normal.
            latents: (B, C, h, w) of the pictures to start from, in place of pure noise.
            condition: what steers the network, under the names that its family gives.

        Returns:
            Images (B, 3, H, W) in [0, 1].
        """
        draw = partial(noise.select, 1)
        x_t = self.initial_scale * draw(0) if latents is None else self._noised(latents, draw(0))
        x_0 = self.sampler.function(self.denoiser, x_t, self.times, condition, draw)
        image: Tensor = self.decoder(x_0)
        return image

    def _noised(self, latents: Tensor, eps: Tensor) -> Tensor:
        return add_noise(self.denoiser.schedule, latents, eps, torch.tensor(self.times[0], dtype=torch.float64))


class Pixels(nn.Module):
    """A trajectory that ends in the bytes of its images, so that nothing is left to do on the host."""

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__()
        self.trajectory = trajectory

    def forward(self, noise: Tensor, **condition: Tensor) -> Tensor:
        """Arguments of the trajectory to pixels (B, H, W, 3) uint8."""
        return to_pixels(self.trajectory(noise, **condition))


class EditedPixels(nn.Module):
    """A trajectory from pictures to pixels.

    Args:
        encoder: from images (B, 3, H, W) in [0, 1] to latents.
        trajectory: whose first time says how much noise the pictures get.
    """

    def __init__(self, encoder: nn.Module, trajectory: Trajectory) -> None:
        super().__init__()
        self.encoder, self.trajectory = encoder, trajectory

    def forward(self, noise: Tensor, image: Tensor, **condition: Tensor) -> Tensor:
        """Arguments of the trajectory, and pictures (B, H, W, 3) uint8, to pixels (B, H, W, 3) uint8."""
        latents = self.encoder(image.to(torch.float32).permute(0, 3, 1, 2) / 255)
        return to_pixels(self.trajectory(noise, latents, **condition))


def to_pixels(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to pixels (B, H, W, 3) uint8, halves rounded up."""
    # Whole numbers: engines differ in how they turn others into bytes.
    levels = (255 * images + 0.5).floor()
    # Last: TensorRT knows bytes only as results.
    return levels.permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)
