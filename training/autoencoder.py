"""The small autoencoder that gives the built-in latent models their space: 64x64 pixels become 8x8x16.

A diffusers `AutoencoderDC` (Deep Compression Autoencoder, arXiv 2410.10733): space-to-channel shortcuts make it learn
quickly, and skipping the full-resolution stage keeps it cheap on a CPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import FewstepError
from .checks import above, at_least
from .phase import Draws, Loss, Phase


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and optimisation.

    Args:
        latent_channels: of the 8x downsampled latent.
        channels: width of the four stages, finest first; the first stage only shuffles pixels.
        encoder_layers: residual blocks in each of the encoder's stages.
        decoder_layers: the same for the decoder, which runs at every generation and so decides the look.
        latent_noise: Gaussian noise added to the latent, in its own standard deviations, so that the decoder forgives
            a student's small errors.
        learning_rate: peak rate of AdamW.
    """

    latent_channels: int = 16
    channels: tuple[int, ...] = (32, 64, 128, 128)
    encoder_layers: tuple[int, ...] = (0, 1, 1, 1)
    decoder_layers: tuple[int, ...] = (0, 1, 2, 2)
    latent_noise: float = 0.1
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        stages = [len(each) for each in (self.channels, self.encoder_layers, self.decoder_layers)]
        if len(set(stages)) > 1 or not stages[0]:
            raise FewstepError(
                f"{stages[0]} channels, {stages[1]} encoder layers and {stages[2]} decoder layers are not possible: "
                "give one of each for every stage"
            )
        at_least(1, latent_channels=self.latent_channels, channels=min(self.channels))
        at_least(0, encoder_layers=min(self.encoder_layers), decoder_layers=min(self.decoder_layers))
        at_least(0, latent_noise=self.latent_noise)
        above(0, learning_rate=self.learning_rate)


def build_autoencoder(config: AutoencoderConfig) -> nn.Module:
    """A freshly initialised `AutoencoderDC`."""
    from diffusers import AutoencoderDC

    stages = len(config.channels)
    model: nn.Module = AutoencoderDC(
        in_channels=3,
        latent_channels=config.latent_channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=config.channels,
        decoder_block_out_channels=config.channels,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=config.decoder_layers,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def autoencoder_phase(model: Any, config: AutoencoderConfig) -> Phase[Tensor]:
    """Reconstruction phase; batches are images (B, 3, H, W) in [-1, 1]."""

    def loss(images: Tensor, draws: Draws) -> Loss:
        latents = model.encode(images).latent
        noise = torch.randn(latents.shape, generator=draws.own, device=latents.device)
        noised = latents + config.latent_noise * latents.detach().float().std() * noise
        reconstruction = model.decode(noised.to(latents.dtype)).sample.float()
        difference = functional.l1_loss(reconstruction, images)
        edges = edge_loss(reconstruction, images)
        # An unpenalised latent drifts to any scale; this keeps it near one without shaping it further.
        scale = latents.float().pow(2).mean().log().pow(2)
        logged = {"l1": difference, "edges": edges, "psnr": psnr(reconstruction, images)}
        return difference + edges + 0.01 * scale, logged

    return Phase("autoencoder", model, loss, config.learning_rate)


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 distance of horizontal and vertical differences at three scales: in a drawing, outlines matter most."""
    total = output.new_zeros(())
    difference = output - target
    for _ in range(3):
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        difference = functional.avg_pool2d(difference, 2)
    return total / 3


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * torch.log10(4 / (output.detach() - target).pow(2).mean())
