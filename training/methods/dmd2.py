"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

The student's samples are moved along the difference of two scores, the frozen teacher's and that of a fake-score
network which is trained, more often than the student, on the student's own samples; a discriminator on the fake
network's features adds real data.
Shapes: samples x (B, C, H, W), times t (B,), logits (B,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.distribution_matching import distribution_matching_gradient
from ...runtime.denoiser import Condition, Denoiser, DenoiserLike, GuidedDenoiser, add_noise
from ..batches import ConditionedBatch
from ..distribution_matching import (
    call_with_features,
    discriminator_loss,
    generator_loss,
    gradient_loss,
)
from ..rollout import backward_simulation
from ..trainer import Loss, Phase


@dataclass(frozen=True)
class DMD2Config:
    """Constants of DMD2.

    Args:
        times: the student's times, `steps + 1` from 1 down to 0.
        guidance: of the teacher; the fake score is never guided (paper: 1.75 for SD1.5, 8 for SDXL).
        student_every: fake-score updates per student update (paper: 10 SD1.5, 5 ImageNet-64 and SDXL).
        student_learning_rate: AdamW's.
        fake_learning_rate: AdamW's, for the fake-score network and its discriminator head.
        generator_weight: of the adversarial term in the student's loss (paper: 3e-3 ImageNet-64).
        discriminator_weight: of the adversarial term in the fake network's loss (paper: 1e-2).
        time_range: t of the score difference is uniform in it (paper: 0.02 to 0.98).
    """

    times: tuple[float, ...] = (1.0, 0.0)
    guidance: float = 3.0
    student_every: int = 5
    student_learning_rate: float = 1e-4
    fake_learning_rate: float = 1e-4
    generator_weight: float = 3e-3
    discriminator_weight: float = 1e-2
    time_range: tuple[float, float] = (0.02, 0.98)


@dataclass(frozen=True)
class DMD2Networks:
    """The three networks, all in the same latent space and process.

    Args:
        student: the module in `student_denoiser`, initialised from the teacher.
        student_denoiser: what becomes the few-step generator.
        teacher: frozen.
        fake: fake-score network, initialised from the teacher.
        fake_module: the module in `fake`.
        feature_block: the block inside `fake_module` whose output the discriminator sees.
        head: turns those features into logits.
        negative: condition (batch 1) for the teacher's guidance.
    """

    student: nn.Module
    student_denoiser: Denoiser
    teacher: DenoiserLike
    fake: Denoiser
    fake_module: nn.Module
    feature_block: nn.Module
    head: nn.Module
    negative: Condition


def dmd2_phases(networks: DMD2Networks, config: DMD2Config) -> list[Phase[ConditionedBatch]]:
    """The two time-scale update rule: fake score and discriminator always, the student every `student_every`-th."""

    def fake(batch: ConditionedBatch, generator: torch.Generator) -> Loss:
        return fake_loss(networks, config, batch, generator)

    def student(batch: ConditionedBatch, generator: torch.Generator) -> Loss:
        return student_loss(networks, config, batch, generator)

    judges = nn.ModuleDict({"fake": networks.fake_module, "head": networks.head})
    return [
        Phase("fake", judges, fake, config.fake_learning_rate, betas=(0.0, 0.99)),
        Phase("student", networks.student, student, config.student_learning_rate, config.student_every, (0.0, 0.99)),
    ]


def student_loss(
    networks: DMD2Networks, config: DMD2Config, batch: ConditionedBatch, generator: torch.Generator
) -> Loss:
    """Distribution-matching term (eq. 2) plus the generator's side of the GAN (section 4.3).

    One noised sample serves both: the fake network's call that gives the score also gives the discriminator's features.
    """
    x = backward_simulation(networks.student_denoiser, batch.x_0.shape, config.times, batch.condition, generator)
    t, eps = _noise_level(x, config, generator)
    x_t = add_noise(networks.fake.schedule, x, eps, t)
    mu_fake, logits = _score_and_logits(networks, x_t, t, batch.condition)
    with torch.no_grad():
        mu_real = guide(networks.teacher, config.guidance, networks.negative)(x_t, t, batch.condition).float()
    matching = gradient_loss(x, distribution_matching_gradient(x, mu_fake, mu_real))
    adversarial = generator_loss(logits)
    return matching + config.generator_weight * adversarial, {"matching": matching, "adversarial": adversarial}


def fake_loss(networks: DMD2Networks, config: DMD2Config, batch: ConditionedBatch, generator: torch.Generator) -> Loss:
    """Denoising loss on student samples (eq. 6 of DMD) plus the discriminator's side of the GAN, in one call."""
    with torch.no_grad():
        x = backward_simulation(networks.student_denoiser, batch.x_0.shape, config.times, batch.condition, generator)
    both = torch.cat([x, batch.x_0])
    t, eps = _noise_level(both, config, generator)
    x_t = add_noise(networks.fake.schedule, both, eps, t)
    condition = {name: torch.cat([value, value]) for name, value in batch.condition.items()}

    def call() -> Tensor:
        return networks.fake.network(*networks.fake.network_input(x_t, t), condition)

    output, features = call_with_features(networks.feature_block, call)
    target = networks.fake.from_sample(both, x_t, t)
    denoising = functional.mse_loss(output[: len(x)].float(), target[: len(x)])
    on_fake, on_real = networks.head(features).float().chunk(2)
    adversarial = discriminator_loss(on_fake, on_real)
    accuracy = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
    loss = denoising + config.discriminator_weight * adversarial
    return loss, {"denoising": denoising, "adversarial": adversarial, "accuracy": accuracy}


def guide(teacher: DenoiserLike, scale: float, negative: Condition) -> DenoiserLike:
    """The teacher with guidance, or itself at scale 1."""
    return teacher if scale == 1 else GuidedDenoiser(teacher, scale, negative)


def _noise_level(x: Tensor, config: DMD2Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    low, high = config.time_range
    t = low + (high - low) * torch.rand(len(x), generator=generator, device=x.device)
    return t, torch.randn(x.shape, generator=generator, device=x.device)


def _score_and_logits(networks: DMD2Networks, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    mu_fake, features = call_with_features(networks.feature_block, lambda: networks.fake(x_t, t, condition).float())
    return mu_fake, networks.head(features).float()
