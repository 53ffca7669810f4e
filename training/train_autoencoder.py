"""`fewstep train autoencoder`: from a folder of pictures to an `AutoencoderDC` with its latent scale."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.families import LatentDecoder, LatentEncoder, save_part
from ..runtime.files import atomic_path, write_json
from .autoencoder import autoencoder_phase, build_autoencoder, psnr
from .batches import ImageBatches
from .data.packed import CaptionedImages, load_captioned_images
from .distribution import is_main_process
from .latents import decode_latents, encode_images
from .picture import save_grid
from .recipe import AutoencoderRecipe
from .trainer import train


def train_autoencoder(data: Path, out: Path, recipe: AutoencoderRecipe, device: torch.device) -> None:
    """Train on the pictures of `data`, measure on its validation split, and save the autoencoder as `out/vae`.

    Raises:
        FewstepError: the data cannot be read, or the loss diverges.
    """
    images = load_captioned_images(data, "train")
    held_out = load_captioned_images(data, "validation").images
    torch.manual_seed(recipe.trainer.seed)
    vae: Any = build_autoencoder(recipe.network).to(device)
    batches = ImageBatches(images.images, recipe.batch_size, recipe.trainer.seed, device)
    phase = autoencoder_phase(vae, recipe.network)
    train([phase], batches, vae, recipe.trainer, out / "training", recipe=asdict(recipe) | {"data": images.identity})
    if is_main_process():
        _save(vae.eval(), images, held_out, out, recipe, device)


def _save(
    vae: Any, images: CaptionedImages, held_out: Tensor, out: Path, recipe: AutoencoderRecipe, device: torch.device
) -> None:
    """Scale the latents to unit deviation, measure on held-out pictures, and write all that belongs to the result."""
    encoder = LatentEncoder(vae.encoder, 1.0)
    vae.register_to_config(scaling_factor=float(1 / encode_images(encoder, images.images, device).std()))

    latents = encode_images(encoder, held_out, device)
    decoded = decode_latents(LatentDecoder(vae.decoder, 1.0), latents, device) * 2 - 1
    original = held_out.float() / 127.5 - 1
    result = {"validation_psnr_db": float(psnr(decoded, original)), "data": images.identity, "recipe": asdict(recipe)}
    write_json(out / "training" / "result.json", result)
    save_grid(torch.cat([original[:16], decoded[:16]]), out / "training" / "reconstructions.png", columns=16)
    with atomic_path(out / "vae") as temporary:
        save_part(vae, temporary)
