"""`fewstep train teacher`: from captioned pictures and an autoencoder to a text-conditional teacher."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.artefact import parts_hash, save_artefact
from ..runtime.denoiser import GuidedDenoiser
from ..runtime.errors import FewstepError
from ..runtime.families import Model, load_part, sana
from ..runtime.schedule import Flow, uniform_times
from .data.packed import load_captioned_images
from .distribution import is_main_process
from .flow_matching import flow_matching_phase
from .latents import load_latent_data, show_samples
from .recipe import TeacherRecipe
from .teacher import build_teacher
from .trainer import train

SAMPLER = "dpm++2m"
"""The solver a teacher is shown and measured with."""


def train_teacher(
    data: Path,
    autoencoder: Path,
    out: Path,
    recipe: TeacherRecipe,
    device: torch.device,
) -> None:
    """Train the teacher and save it, with its curve and sample grids, as a diffusers directory at `out`.

    Args:
        data: a captioned data set.
        autoencoder: directory that `fewstep train autoencoder` wrote.
        out: the teacher's directory; `out/training` holds what training leaves behind.
        recipe: network, loss, budget and optimisation.
        device: where to train.

    Raises:
        FewstepError: the data or the autoencoder cannot be read, or the loss diverges.
    """
    from diffusers import AutoencoderDC

    if not (autoencoder / "vae").is_dir():
        raise FewstepError(f"{autoencoder} holds no autoencoder: make one with `fewstep train autoencoder`")
    vae: Any = load_part(AutoencoderDC, autoencoder / "vae", device)
    torch.manual_seed(recipe.trainer.seed)
    side = load_captioned_images(data, "train").images.shape[-1] // vae.spatial_compression_ratio
    network = build_teacher(recipe.network, vae.config.latent_channels, side).to(device)
    model = assemble(network, vae)
    latent_data = load_latent_data(data, model, recipe.batch_size, recipe.trainer.seed, device)
    phase = flow_matching_phase(network, model.denoiser, latent_data.negative, recipe.method)

    folder = out / "training"
    samples = folder / "samples.png"
    guided = GuidedDenoiser(model.denoiser, recipe.network.guidance, latent_data.negative)

    def show(step: int) -> list[Path]:
        show_samples(guided, SAMPLER, uniform_times(20), latent_data, samples)
        return [samples]

    origin = {"data": latent_data.identity, "autoencoder": parts_hash(autoencoder, ["vae"])}
    train([phase], latent_data.batches, network, recipe.trainer, folder, show, recipe=asdict(recipe) | origin)
    card = {
        "kind": "teacher",
        "method": "flow_matching",
        "steps": [],
        "times": {},
        "sampler": SAMPLER,
        "guidance": recipe.network.guidance,
        "data": latent_data.identity,
        "recipe": asdict(recipe),
    }
    if is_main_process():
        save_artefact(out, lambda folder: sana.save(folder, network, vae), card)


def assemble(network: nn.Module, vae: Any) -> Model:
    """A model of a network in training, on the straight-line process."""
    return sana.assemble(network, vae, Flow(), "flow_prediction")
