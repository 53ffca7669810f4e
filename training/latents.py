"""What latent training runs on, made once: latents, caption states, the empty prompt; and the grids to watch it by."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..runtime.denoiser import Condition, DenoiserLike
from ..runtime.families import Model
from ..runtime.files import atomic_path
from .batches import LatentBatches
from .data.packed import CaptionedImages, load_captioned_images
from .fixed_noise import sample_at_fixed_noise
from .picture import save_grid
from .text_cache import cache_text


@dataclass(frozen=True)
class LatentData:
    """Batches of latents and conditions, with what is needed to look at samples.

    Args:
        batches: latents and caption states.
        decoder: latents to images in [0, 1].
        negative: the empty prompt's condition, batch 1.
        images: the pictures behind the latents.
    """

    batches: LatentBatches
    decoder: nn.Module
    negative: Condition
    images: CaptionedImages

    @property
    def identity(self) -> dict[str, Any]:
        """What an artefact records of the data it was trained on."""
        return {"identity": self.images.identity, "images": len(self.images.images)}

    def spread(self, count: int) -> tuple[Tensor, Condition]:
        """Numbers (count,) of samples evenly over the data, and the conditions of their first captions."""
        chosen = torch.linspace(0, len(self.batches.latents) - 1, count).long()
        condition = self.batches.text.condition(chosen, torch.zeros(count))
        return chosen, {name: value.to(self.batches.device) for name, value in condition.items()}


def load_latent_data(data: Path, model: Model, batch_size: int, seed: int, device: torch.device) -> LatentData:
    """Encode a data set's training pictures and captions.

    Raises:
        FewstepError: the data cannot be read.
    """
    images = load_captioned_images(data, "train")
    latents = cache_latents(model.encoder, images, data / ".packed", device)
    # The empty prompt goes after the pictures' captions, so that a full cache leaves the encoder nothing to do.
    text = cache_text([*images.captions, ("",)], model.load_text_encoder(), data / ".packed")
    empty = text.condition(torch.tensor([len(images.captions)]), torch.zeros(1))
    negative = {name: value.to(device) for name, value in empty.items()}
    return LatentData(LatentBatches(latents, text, batch_size, seed, device), model.decoder, negative, images)


def cache_latents(encoder: nn.Module, images: CaptionedImages, folder: Path, device: torch.device) -> Tensor:
    """Latents (N, C, h, w) float32 of a split, read from `folder` when pictures and encoder are unchanged."""
    digest = hashlib.sha256(images.identity.encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    path = folder / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if not path.exists():
        with atomic_path(path) as temporary:
            save_file({"latents": encode_images(encoder, images.images, device).contiguous()}, temporary)
    latents: Tensor = load_file(path)["latents"]
    return latents


@torch.inference_mode()
def encode_images(encoder: nn.Module, images: Tensor, device: torch.device, batch_size: int = 64) -> Tensor:
    """Latents (N, C, h, w), float32 on the CPU, of images (N, 3, H, W) uint8."""
    chunks = track(torch.split(images, batch_size), "encoding pictures", transient=True)
    return torch.cat([encoder(chunk.to(device).float() / 255).float().cpu() for chunk in chunks])


@torch.inference_mode()
def decode_latents(decoder: nn.Module, latents: Tensor, device: torch.device, batch_size: int = 64) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], float32 on the CPU, of latents (N, C, h, w)."""
    return torch.cat([decoder(chunk.to(device)).float().cpu() for chunk in torch.split(latents, batch_size)])


@torch.inference_mode()
def show_samples(
    denoiser: DenoiserLike,
    sampler: str,
    times: Sequence[float],
    data: LatentData,
    path: Path,
    count: int = 16,
    guidance: float | None = None,
) -> None:
    """Write a grid: real pictures spread over the data, and under each what `denoiser` makes of its caption.

    A denoiser that takes the guidance scale as an input is given `guidance`.
    """
    batches = data.batches
    chosen, condition = data.spread(count)
    shape, seeds = batches.latents.shape[1:], range(count)
    latents = sample_at_fixed_noise(denoiser, sampler, times, condition, seeds, shape, batches.device, guidance)
    real = data.images.images[chosen].float() / 127.5 - 1
    save_grid(torch.cat([real, decode_latents(data.decoder, latents, batches.device) * 2 - 1]), path, columns=count)
