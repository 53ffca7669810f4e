"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet on KL latents, conditioned on CLIP's token states."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artefact import INDEX
from ..denoiser import Condition, Denoiser, Network
from ..files import read_json
from ..schedule import prediction_from_config, schedule_from_config
from . import Model, PartLoader, guidance_of
from .stock import StockTextEncoder, latent_maps, load_text_pipeline, save_beside_parts, text_identity

GUIDANCE, NETWORK = 7.5, "unet"
GUIDANCE_CHANNELS = 256
"""Of the sinusoidal embedding of the guidance scale (LCM, arXiv 2310.04378)."""


def network_call(unet: Any) -> Network:
    """How a `UNet2DConditionModel` is called: `encoder_hidden_states` (B, L, D), and `guidance` (B,) if it takes it."""
    channels = unet.config.time_cond_proj_dim

    def call(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = unet(
            x,
            network_time,
            encoder_hidden_states=condition["encoder_hidden_states"],
            timestep_cond=None if channels is None else embed_guidance(guidance_of(condition), channels).to(x),
            return_dict=False,
        )[0]
        return output

    return call


def embed_guidance(guidance: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding (B, channels) of the scale `w` (B,) less 1, by the function of diffusers' own pipeline.

    Its phases are so large that the same formula, rounded in another order, differs by a thousandth.
    """
    from diffusers import StableDiffusionPipeline

    with guidance.device:  # where it makes its frequencies
        embedding: Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(None, guidance - 1, channels)
    return embedding


def load(directory: Path, device: torch.device, loader: PartLoader) -> Model:
    """Open a directory whose `model_index.json` names `StableDiffusionPipeline`."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    tiny = read_json(directory / INDEX).get("vae", [None])[-1] == AutoencoderTiny.__name__
    unet: Any = loader(UNet2DConditionModel, directory / "unet", device)
    encoder, decoder = latent_maps(loader(AutoencoderTiny if tiny else AutoencoderKL, directory / "vae", device))
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Model(
        network=unet,
        denoiser=Denoiser(network_call(unet), schedule_from_config(scheduler), prediction_from_config(scheduler)),
        encoder=encoder,
        decoder=decoder,
        sample_shape=(unet.config.in_channels, height, width),
        load_text_encoder=partial(_load_text_encoder, directory, device, loader),
    )


def _load_text_encoder(directory: Path, device: torch.device, loader: PartLoader) -> StockTextEncoder:
    from diffusers import StableDiffusionPipeline

    pipeline, encoders = load_text_pipeline(
        StableDiffusionPipeline, directory, device, loader, requires_safety_checker=False
    )

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        states, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states}

    return StockTextEncoder(encode, text_identity(directory), encoders)


def feature_block(unet: Any) -> tuple[nn.Module, int]:
    """The middle block and the channels of its output (B, C, h, w), for a discriminator."""
    return unet.mid_block, unet.config.block_out_channels[-1]


def with_guidance_input(unet: Any) -> nn.Module:
    """A copy that also takes the guidance scale, and gives the same output until it is trained."""
    channels = unet.config.time_cond_proj_dim or GUIDANCE_CHANNELS
    copy: nn.Module = type(unet).from_config(unet.config, time_cond_proj_dim=channels)
    weights = unet.state_dict()
    weights.setdefault("time_embedding.cond_proj.weight", torch.zeros(unet.conv_in.out_channels, channels))
    copy.load_state_dict(weights)
    return copy.to(unet.device)


def save_student(directory: Path, unet: Any, teacher: Path, sampler: str) -> None:
    """Write in float16 what stock `StableDiffusionPipeline.from_pretrained` opens, with the teacher's other parts.

    `pipeline(prompt, num_inference_steps=..., guidance_scale=1)` then draws what fewstep does, to the nearest of the
    teacher's training steps; a student with an input for the guidance scale takes it as `guidance_scale`.

    Args:
        directory: an existing folder.
        unet: the student.
        teacher: the directory to copy from.
        sampler: the student's own, a name in `samplers.SAMPLERS`.
    """
    scheduler = _scheduler(read_json(teacher / "scheduler" / "scheduler_config.json"), sampler)
    save_beside_parts(directory, teacher, "unet", unet, scheduler)


def _scheduler(config: Mapping[str, Any], sampler: str) -> Any:
    from diffusers import DDIMScheduler, LCMScheduler

    full = DDIMScheduler.from_config(dict(config)).config
    process = {name: full[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
    process |= {name: full[name] for name in ("trained_betas", "prediction_type", "rescale_betas_zero_snr")}
    # `steps_offset` shifts neither scheduler's times here; the pipeline warns of any other value.
    shared = {**process, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
    if sampler == "consistency":
        return LCMScheduler(**shared, original_inference_steps=full["num_train_timesteps"])
    return DDIMScheduler(**shared, timestep_spacing="trailing")
