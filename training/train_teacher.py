"""`fewstep train teacher`: from captioned pictures and an autoencoder to a text-conditional teacher."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.artefact import save_artefact
from ..runtime.denoiser import GuidedDenoiser
from ..runtime.errors import FewstepError
from ..runtime.families import Model, load_part, sana
from ..runtime.schedule import Flow, uniform_times
from .latents import load_latent_data, show_samples
from .methods.flow_matching import FlowMatchingConfig, flow_matching_phase
from .trainer import TrainerConfig, train

SAMPLER = "dpm++2m"
"""The solver a teacher is shown and measured with."""


@dataclass(frozen=True)
class TeacherConfig:
    """Shape of the built-in teacher, a small `SanaTransformer2DModel`: 6.9M parameters, 64 tokens for 64x64 pixels.

    Args:
        layers: transformer blocks.
        heads: attention heads of 32 channels.
        size: side of the latent.
        guidance: the scale that samples are shown and students distilled with.
    """

    layers: int = 6
    heads: int = 8
    size: int = 8
    guidance: float = 3.0


def build_teacher(config: TeacherConfig, channels: int) -> nn.Module:
    """A freshly initialised transformer for latents (channels, size, size)."""
    from diffusers import SanaTransformer2DModel

    width = 32 * config.heads
    model: nn.Module = SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=config.heads,
        attention_head_dim=32,
        num_layers=config.layers,
        num_cross_attention_heads=config.heads // 2,
        cross_attention_head_dim=64,
        cross_attention_dim=width,
        caption_channels=384,
        mlp_ratio=2.5,
        sample_size=config.size,
        patch_size=1,
        interpolation_scale=1,
    )
    return model


def train_teacher(
    data: Path,
    autoencoder: Path,
    out: Path,
    config: TeacherConfig,
    method: FlowMatchingConfig,
    trainer: TrainerConfig,
    batch_size: int,
    device: torch.device,
) -> None:
    """Train the teacher and save it, with its curve and sample grids, as a diffusers directory at `out`.

    Args:
        data: a captioned data set.
        autoencoder: directory that `fewstep train autoencoder` wrote.
        out: the teacher's directory; `out/training` holds what training leaves behind.
        config: the network.
        method: the loss.
        trainer: budget and optimisation.
        batch_size: samples an iteration.
        device: where to train.

    Raises:
        FewstepError: the data or the autoencoder cannot be read, or the loss diverges.
    """
    from diffusers import AutoencoderDC

    if not (autoencoder / "vae").is_dir():
        raise FewstepError(f"{autoencoder} holds no autoencoder: make one with `fewstep train autoencoder`")
    vae: Any = load_part(AutoencoderDC, autoencoder / "vae", device)
    torch.manual_seed(trainer.seed)
    network = build_teacher(config, vae.config.latent_channels).to(device)
    model = assemble(network, vae)
    latent_data = load_latent_data(data, model, batch_size, trainer.seed, device)
    phase = flow_matching_phase(network, model.denoiser, latent_data.negative, method)

    def show(average: nn.Module, step: int) -> None:
        guided = GuidedDenoiser(assemble(average, vae).denoiser, config.guidance, latent_data.negative)
        show_samples(guided, SAMPLER, uniform_times(20), latent_data, out / "training" / "samples.png")

    trained = train([phase], latent_data.batches, network, trainer, out / "training", show)
    show(trained.eval(), 0)
    recipe = {"network": asdict(config), "method": asdict(method), "trainer": asdict(trainer), "batch_size": batch_size}
    card = {
        "kind": "teacher",
        "method": "flow_matching",
        "steps": [],
        "times": {},
        "sampler": SAMPLER,
        "guidance": config.guidance,
        "data": latent_data.identity,
        "recipe": recipe,
    }
    save_artefact(out, lambda folder: sana.save(folder, trained, vae), card)


def assemble(network: nn.Module, vae: Any) -> Model:
    """A model of a network in training, on the straight-line process."""
    return sana.assemble(network, vae, Flow(), "flow_prediction")
