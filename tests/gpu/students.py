"""Students with random weights, of the sizes that are deployed: generation costs the same whatever they know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.runtime.denoiser import Condition, Network
from fewstep.runtime.families import LatentDecoder, sana, stable_diffusion
from fewstep.runtime.families.stock import latent_maps
from fewstep.runtime.schedule import Flow, Schedule, schedule_from_config
from fewstep.training.autoencoder import AutoencoderConfig, build_autoencoder
from fewstep.training.teacher import TeacherConfig, build_teacher

TEXT_TOKENS = 77
SD_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
SANA_AUTOENCODER: Mapping[str, Any] = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}


@dataclass(frozen=True)
class Student:
    """What a generation needs.

    Args:
        network: the diffusers module.
        call: makes of the module, or of a compiled one, what a denoiser calls.
        decoder: latents to images (B, 3, H, W) in [0, 1].
        sample_shape: (C, h, w) of a latent.
        schedule: of the noise.
        prediction: what the network predicts.
        condition: shape of each tensor for one image; masks are of ones, the others random.
        layout: of the weights in memory.
    """

    network: nn.Module
    call: Callable[[Any], Network]
    decoder: nn.Module
    sample_shape: tuple[int, int, int]
    schedule: Schedule
    prediction: str
    condition: Mapping[str, tuple[int, ...]]
    layout: torch.memory_format = torch.contiguous_format


def stable_diffusion_1(**unet: Any) -> Student:
    """Stable Diffusion 1.5 at 512 pixels, with the tiny decoder."""
    from diffusers import UNet2DConditionModel

    sizes = {"sample_size": 64, "cross_attention_dim": 768, **unet}
    states = (TEXT_TOKENS, sizes["cross_attention_dim"])
    network = UNet2DConditionModel(**sizes)
    return _with_unet(network, stable_diffusion.network_call, {"encoder_hidden_states": states})


def stable_diffusion_xl(**unet: Any) -> Student:
    """SDXL at 1024 pixels, with the tiny decoder."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(**{**SDXL_UNET, **unet})
    config: Any = network.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    states = (TEXT_TOKENS, config.cross_attention_dim)
    condition = {"encoder_hidden_states": states, "text_embeds": (pooled,), "time_ids": (6,)}
    return _with_unet(network, _call_sdxl, condition)


def _call_sdxl(unet: Any) -> Network:
    def call(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        states = condition["encoder_hidden_states"]
        output: Tensor = unet(x, network_time, states, added_cond_kwargs=added, return_dict=False)[0]
        return output

    return call


def _with_unet(network: Any, call: Callable[[Any], Network], condition: Mapping[str, tuple[int, ...]]) -> Student:
    from diffusers import AutoencoderTiny

    _, decoder = latent_maps(AutoencoderTiny())
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    with torch.device("cpu"):  # where samplers compute their coefficients, whatever device the networks are made on
        schedule = schedule_from_config(SD_SCHEDULE)
    return Student(network, call, decoder, shape, schedule, "epsilon", condition, torch.channels_last)


def sana_1600m(autoencoder: Mapping[str, Any] = SANA_AUTOENCODER, **transformer: Any) -> Student:
    """Sana 1.6B at 512 pixels, with its own decoder."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    network = SanaTransformer2DModel(**{"sample_size": 16, **transformer})
    return _with_transformer(network, AutoencoderDC(**autoencoder), text=300)


def built_in(network: TeacherConfig | None = None, shape: AutoencoderConfig | None = None) -> Student:
    """The built-in student at 64 pixels."""
    shape = shape or AutoencoderConfig()
    transformer = build_teacher(network or TeacherConfig(), shape.latent_channels, 8)
    return _with_transformer(transformer, build_autoencoder(shape), text=24)


def _with_transformer(network: Any, vae: Any, text: int) -> Student:
    config = network.config
    return Student(
        network=network,
        call=sana.network_call,
        decoder=LatentDecoder(vae.decoder, vae.config.scaling_factor),
        sample_shape=(config.in_channels, config.sample_size, config.sample_size),
        schedule=Flow(),
        prediction="flow_prediction",
        condition={"encoder_hidden_states": (text, config.caption_channels), "encoder_attention_mask": (text,)},
    )


STUDENTS: dict[str, Callable[[], Student]] = {
    "SD1.5": stable_diffusion_1,
    "Sana": sana_1600m,
    "built-in": built_in,
    "SDXL": stable_diffusion_xl,
}
"""Those that compile soonest first."""


def random_condition(student: Student, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Text states as random as the weights."""
    return {
        name: torch.ones(batch, *shape, device=device, dtype=dtype)
        if name.endswith("mask")
        else torch.randn(batch, *shape, device=device, dtype=dtype)
        for name, shape in student.condition.items()
    }
