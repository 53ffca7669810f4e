"""The autoencoder: shapes, its loss's parts, and that it learns."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fewstep.training.autoencoder import AutoencoderConfig, autoencoder_phase, build_autoencoder, edge_loss, psnr
from fewstep.training.numerics import step_draws
from fewstep.training.recorder import read_curve
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig

TINY = AutoencoderConfig(latent_channels=4, channels=(8, 8, 16, 16), decoder_layers=(0, 1, 1, 1))


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth pictures (4, 3, 32, 32) in [-1, 1]."""
    return functional.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, (32, 32), mode="bilinear")


@pytest.mark.parametrize("side", [32, 64])
def test_latents_are_eight_times_smaller(side: int) -> None:
    model: Any = build_autoencoder(TINY).eval()
    with torch.inference_mode():
        latents = model.encode(torch.rand(2, 3, side, side)).latent
        decoded = model.decode(latents).sample
    assert latents.shape == (2, 4, side // 8, side // 8)
    assert decoded.shape == (2, 3, side, side)


def test_training_lowers_the_loss(images: torch.Tensor, tmp_path: Path) -> None:
    model = build_autoencoder(TINY)
    phase = autoencoder_phase(model, replace(TINY, learning_rate=3e-3))
    trainer = TrainerConfig(iterations=15, warmup=1, precision="no", log_every=1)
    train([phase], lambda step, index: images, model, trainer, tmp_path)
    curve = read_curve(tmp_path)
    assert curve[1]["autoencoder/loss"] < curve[0]["autoencoder/loss"]
    assert curve[-1]["autoencoder/loss"] < 0.8 * curve[0]["autoencoder/loss"]
    assert curve[-1]["autoencoder/psnr"] > curve[0]["autoencoder/psnr"]


def test_loss_holds_the_latent_near_unit_scale(images: torch.Tensor) -> None:
    """A latent that is blown up, and shrunk again before decoding, looks the same and costs more."""
    model: Any = build_autoencoder(TINY)

    class Scaled:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def encode(self, images: torch.Tensor) -> Any:
            encoded = model.encode(images)
            unit = encoded.latent / encoded.latent.pow(2).mean().sqrt().detach()
            return type(encoded)(latent=unit * self.scale)

        def decode(self, latents: torch.Tensor) -> Any:
            return model.decode(latents / self.scale)

    def loss(scale: float) -> float:
        phase = autoencoder_phase(Scaled(scale), TINY)
        return phase.loss(images, step_draws(0, 0, 0, images.device))[0].item()

    assert loss(10) - loss(1) == pytest.approx(0.01 * math.log(100) ** 2, rel=1e-3)
    assert loss(0.1) - loss(1) == pytest.approx(0.01 * math.log(100) ** 2, rel=1e-3)


def test_edges_are_compared_and_shades_are_not(images: torch.Tensor) -> None:
    assert edge_loss(images, images).item() == 0
    assert edge_loss(images + 0.3, images).item() == pytest.approx(0, abs=1e-6)
    assert edge_loss(functional.avg_pool2d(images, 3, 1, 1), images).item() > 1e-3
    # One column of height 1 among 8: two of seven horizontal differences are 1 at full size, and half of that height is
    # seen in one of four columns, then a quarter of it in one of two.
    line = torch.zeros(1, 1, 8, 8)
    line[..., 3] = 1
    assert edge_loss(line, torch.zeros_like(line)).item() == pytest.approx((2 / 7 + 0.5 * 2 / 3 + 0.25) / 3)


def test_psnr_counts_the_range_of_two() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x + 0.2, x).item() == pytest.approx(20)
    assert psnr(x + 2, x).item() == pytest.approx(0, abs=1e-5)
