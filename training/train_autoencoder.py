"""`fewstep train autoencoder`: from a folder of pictures to an `AutoencoderDC` with its latent scale."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..runtime.families import LatentDecoder, LatentEncoder
from ..runtime.files import atomic_path, write_json
from .autoencoder import AutoencoderConfig, autoencoder_phase, build_autoencoder, psnr
from .batches import ImageBatches
from .data.packed import load_captioned_images
from .latents import encode_images
from .picture import save_grid
from .trainer import TrainerConfig, train


def train_autoencoder(
    data: Path, out: Path, config: AutoencoderConfig, trainer: TrainerConfig, batch_size: int, device: torch.device
) -> None:
    """Train on the pictures of `data`, measure on its validation split, and save the autoencoder as `out/vae`.

    Raises:
        FewstepError: the data cannot be read, or the loss diverges.
    """
    images = load_captioned_images(data, "train")
    held_out = load_captioned_images(data, "validation").images
    torch.manual_seed(trainer.seed)
    fresh = build_autoencoder(config).to(device)
    batches = ImageBatches(images.images, batch_size, trainer.seed, device)
    vae: Any = train([autoencoder_phase(fresh, config)], batches, fresh, trainer, out / "training").eval()
    encoder = LatentEncoder(vae.encoder, 1.0)
    vae.register_to_config(scaling_factor=float(1 / encode_images(encoder, images.images, device).std()))

    with torch.inference_mode():
        decoded = LatentDecoder(vae.decoder, 1.0)(encode_images(encoder, held_out, device).to(device)).cpu() * 2 - 1
    original = held_out.float() / 127.5 - 1
    recipe = {"network": asdict(config), "trainer": asdict(trainer), "batch_size": batch_size}
    result = {"validation_psnr_db": float(psnr(decoded, original)), "data": images.identity, "recipe": recipe}
    write_json(out / "training" / "result.json", result)
    save_grid(torch.cat([original[:16], decoded[:16]]), out / "training" / "reconstructions.png", columns=16)
    with atomic_path(out / "vae") as temporary:
        vae.half().save_pretrained(temporary)
