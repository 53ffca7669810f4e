"""Sana (arXiv 2410.10629): a linear-attention transformer on deep-compression latents, conditioned on token states.

The shipped models are small members of it, with MiniLM in the place of Gemma.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Condition, Denoiser, Network
from ..files import read_json, write_json
from ..schedule import Schedule, prediction_from_config, schedule_from_config
from ..text import load_text_encoder
from . import LatentDecoder, LatentEncoder, Model, PartLoader, guidance_of, load_part, save_part

GUIDANCE, NETWORK = None, "transformer"


def network_call(transformer: nn.Module) -> Network:
    """How a `SanaTransformer2DModel` is called.

    Its condition is `encoder_hidden_states` (B, L, D), `encoder_attention_mask` (B, L), and `guidance` (B,) if it takes
    the scale.
    """
    config: Any = transformer.config

    def call(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = transformer(
            x,
            encoder_hidden_states=condition["encoder_hidden_states"],
            encoder_attention_mask=condition["encoder_attention_mask"],
            timestep=network_time,
            guidance=guidance_of(condition) * config.guidance_embeds_scale if config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return output

    return call


def load(directory: Path, device: torch.device, loader: PartLoader) -> Model:
    """Open a directory whose `model_index.json` names `SanaPipeline`."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    transformer = loader(SanaTransformer2DModel, directory / "transformer", device)
    vae = loader(AutoencoderDC, directory / "vae", device)
    return assemble(transformer, vae, schedule_from_config(scheduler), prediction_from_config(scheduler))


def assemble(transformer: Any, vae: Any, schedule: Schedule, prediction: str) -> Model:
    """A model from its loaded parts."""
    config = transformer.config
    return Model(
        network=transformer,
        denoiser=Denoiser(network_call(transformer), schedule, prediction),
        encoder=LatentEncoder(vae.encoder, vae.config.scaling_factor),
        decoder=LatentDecoder(vae.decoder, vae.config.scaling_factor),
        sample_shape=(config.in_channels, config.sample_size, config.sample_size),
        load_text_encoder=load_text_encoder,
    )


def feature_block(transformer: Any) -> tuple[nn.Module, int]:
    """The block at mid-depth and the width of its output, for a discriminator."""
    blocks = transformer.transformer_blocks
    return blocks[len(blocks) // 2], transformer.config.num_attention_heads * transformer.config.attention_head_dim


def with_guidance_input(transformer: Any) -> nn.Module:
    """A copy that also takes the guidance scale, and gives the same output until it is trained."""
    copy: Any = type(transformer).from_config(transformer.config, guidance_embeds=True)
    weights = {
        name.replace("time_embed.emb.", "time_embed."): weight for name, weight in transformer.state_dict().items()
    }
    nn.init.zeros_(copy.time_embed.guidance_embedder.linear_2.weight)
    nn.init.zeros_(copy.time_embed.guidance_embedder.linear_2.bias)
    embedder = copy.time_embed.guidance_embedder.state_dict(prefix="time_embed.guidance_embedder.")
    copy.load_state_dict({**embedder, **weights})
    moved: nn.Module = copy.to(transformer.device)
    return moved


def save(directory: Path, transformer: Any, vae: Any, stochastic: bool = False) -> None:
    """Write in float16 what stock `SanaPipeline.from_pretrained(..., text_encoder=None, tokenizer=None)` opens.

    Args:
        directory: an existing folder.
        transformer: the denoising network.
        vae: the `AutoencoderDC`.
        stochastic: re-noise between steps, as consistency sampling does.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, __version__

    save_part(transformer, directory / "transformer")
    save_part(vae, directory / "vae")
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic).save_pretrained(directory / "scheduler")
    index = {
        "_class_name": "SanaPipeline",
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    write_json(directory / "model_index.json", index)


def save_student(directory: Path, transformer: Any, teacher: Path, sampler: str) -> None:
    """Write a student that is sampled with `sampler`, with the decoder of the teacher's directory."""
    from diffusers import AutoencoderDC

    vae = load_part(AutoencoderDC, teacher / "vae", torch.device("cpu"))
    save(directory, transformer, vae, stochastic=sampler == "consistency")
