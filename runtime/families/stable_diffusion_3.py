"""Stable Diffusion 3 (arXiv 2403.03206): a flow transformer on KL latents, conditioned on two CLIPs and T5."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Condition, Denoiser, Network
from ..errors import FewstepError
from ..files import read_json
from ..schedule import prediction_from_config, schedule_from_config
from . import Model, PartLoader
from .stock import StockTextEncoder, latent_maps, load_text_pipeline, save_beside_parts, text_identity

GUIDANCE, NETWORK = 7.0, "transformer"


def network_call(transformer: Any) -> Network:
    """How an `SD3Transformer2DModel` is called: `encoder_hidden_states` (B, L, D), `pooled_projections` (B, D)."""

    def call(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = transformer(
            hidden_states=x,
            timestep=network_time,
            encoder_hidden_states=condition["encoder_hidden_states"],
            pooled_projections=condition["pooled_projections"],
            return_dict=False,
        )[0]
        return output

    return call


def load(directory: Path, device: torch.device, loader: PartLoader) -> Model:
    """Open a directory whose `model_index.json` names `StableDiffusion3Pipeline`."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    transformer: Any = loader(SD3Transformer2DModel, directory / "transformer", device)
    encoder, decoder = latent_maps(loader(AutoencoderKL, directory / "vae", device))
    size = transformer.config.sample_size
    schedule, prediction = schedule_from_config(scheduler), prediction_from_config(scheduler)
    return Model(
        network=transformer,
        denoiser=Denoiser(network_call(transformer), schedule, prediction),
        encoder=encoder,
        decoder=decoder,
        sample_shape=(transformer.config.in_channels, size, size),
        load_text_encoder=partial(_load_text_encoder, directory, transformer, device, loader),
    )


def _load_text_encoder(
    directory: Path, transformer: nn.Module, device: torch.device, loader: PartLoader
) -> StockTextEncoder:
    from diffusers import StableDiffusion3Pipeline

    # Many leave T5 out, for its size; `encode_prompt` then gives zeros of the width that the transformer wants.
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (directory / name).is_dir()}
    pipeline, encoders = load_text_pipeline(
        StableDiffusion3Pipeline, directory, device, loader, transformer=transformer, **absent
    )

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    return StockTextEncoder(encode, text_identity(directory), encoders)


def feature_block(transformer: Any) -> tuple[nn.Module, int]:
    """The norm at the entry of the middle block and the width of the image tokens (B, N, D) that it puts out first.

    A block itself puts out the text tokens first.
    """
    blocks = transformer.transformer_blocks
    return blocks[len(blocks) // 2].norm1, transformer.inner_dim


def with_guidance_input(transformer: Any) -> nn.Module:
    """Not possible.

    Raises:
        FewstepError: always.
    """
    raise FewstepError(f"{type(transformer).__name__} has no guidance input: distil it for one guidance scale")


def save_student(directory: Path, transformer: Any, teacher: Path, sampler: str) -> None:
    """Write in float16 what stock `StableDiffusion3Pipeline.from_pretrained` opens, with the teacher's other parts.

    `pipeline(prompt, sigmas=times[:-1], guidance_scale=1)` then draws what fewstep does, `times` being the card's.

    Args:
        directory: an existing folder.
        transformer: the student.
        teacher: the directory to copy from.
        sampler: the student's own, a name in `samplers.SAMPLERS`; consistency sampling re-noises between steps, which
            diffusers calls stochastic.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = read_json(teacher / "scheduler" / "scheduler_config.json")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=sampler == "consistency")
    save_beside_parts(directory, teacher, "transformer", transformer, scheduler)
