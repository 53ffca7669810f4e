"""Plain diffusers directories draw, through `Pipeline`, what diffusers itself draws from the same noise and times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.runtime import Pipeline
from fewstep.runtime.artefact import read_card, weights_hash
from fewstep.runtime.families import load_model
from fewstep.runtime.noise import gaussian_noise
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.trajectory import Trajectory

FAMILIES = ("stable_diffusion", "stable_diffusion_2", "stable_diffusion_3", "stable_diffusion_3_with_t5")
PROMPTS = ["a red cat", "two blue leaves in a wood"]
CPU = torch.device("cpu")
Stock = Callable[[Path], Any]


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def ours(directory: Path, noise: Tensor, times: list[float], guidance: float) -> Tensor:
    model = load_model(directory, CPU)
    encoder = model.load_text_encoder()
    trajectory = Trajectory(model, get_sampler("euler"), times, guidance, encoder([""]))
    with torch.inference_mode():
        return trajectory(noise[:, None], **encoder(PROMPTS))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_times_of_the_stock_scheduler_give_its_images(stock: Stock, directory: Path, guidance: float) -> None:
    pipeline, noise = stock(directory), torch.randn(2, 4, 8, 8)
    expected = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=guidance, latents=noise, output_type="pt").images
    if "3" in type(pipeline).__name__:
        sigmas = pipeline.scheduler.sigmas.double()
        times = (sigmas / (3 - 2 * sigmas)).tolist()  # the scheduler's shift of 3, undone
    else:
        times = [*((pipeline.scheduler.timesteps + 1) / 1000).tolist(), 0.0]
    torch.testing.assert_close(ours(directory, noise, times, guidance), expected, rtol=0, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pipeline_draws_what_diffusers_draws_at_evenly_spaced_times(
    stock: Stock, directory: Path, guidance: float
) -> None:
    pipeline = stock(directory)
    if "3" in type(pipeline).__name__:
        spacing = {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    else:
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )
        spacing = {"num_inference_steps": 4}
    noise = torch.from_numpy(gaussian_noise([3, 4], 0, (4, 8, 8)))
    expected = pipeline(PROMPTS, guidance_scale=guidance, latents=noise, output_type="np", **spacing).images
    result = Pipeline.from_pretrained(directory, device="cpu").generate(
        PROMPTS, steps=4, seed=[3, 4], guidance=guidance, sampler="ddim"
    )
    np.testing.assert_allclose(result.arrays / 255, expected, rtol=0, atol=0.5 / 255 + 1e-4)
    assert result.engine == "torch"


def test_a_plain_directory_is_a_teacher_with_the_guidance_that_diffusers_takes(directory: Path) -> None:
    card = read_card(directory)
    assert (card.kind, card.steps, card.sampler) == ("teacher", (), "dpm++2m")
    assert card.guidance == (7.0 if "stable-diffusion-3" in str(directory) else 7.5)
    assert card.weights == weights_hash(directory)


def test_images_survive_the_autoencoder_as_in_diffusers(stock: Stock, directory: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    model, vae = load_model(directory, CPU), stock(directory).vae
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        latents = model.encoder(images)
        mean = vae.encode(VaeImageProcessor.normalize(images)).latent_dist.mode()
        expected = VaeImageProcessor.denormalize(vae.decode(mean).sample)
        torch.testing.assert_close(model.decoder(latents), expected, rtol=0, atol=1e-5)
    scaled = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(latents, scaled)
    assert latents.shape[1:] == model.sample_shape


def test_the_text_encoder_is_known_by_its_files(stable_diffusion: Path, stable_diffusion_3: Path) -> None:
    model = load_model(stable_diffusion, CPU)
    encoder = model.load_text_encoder()
    assert encoder.identity == load_model(stable_diffusion, CPU).load_text_encoder().identity
    assert encoder.identity != load_model(stable_diffusion_3, CPU).load_text_encoder().identity
    assert {name: value.shape for name, value in encoder(PROMPTS).items()} == {"encoder_hidden_states": (2, 16, 16)}
