"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

The student's samples are moved along the difference of two scores, the frozen teacher's and that of a fake-score
network which is trained, more often than the student, on the student's own samples; a discriminator on the fake
network's features adds real data.
Shapes: samples x (B, C, H, W), times t (B,), logits (B,).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.distribution_matching import distribution_matching_gradient
from ...runtime.denoiser import Condition, DenoiserLike, add_noise
from ...runtime.schedule import uniform_times
from ..batches import ConditionedBatch
from ..checks import above, at_least, below_one, rising
from ..distribution_matching import (
    FeatureHead,
    accuracy,
    call_with_features,
    discriminator_loss,
    generator_loss,
    gradient_loss,
    noise_level,
    twice,
)
from ..method import Copy, Stage, Task
from ..pair_regression import regression_phase
from ..pairs import PairsConfig, make_pairs
from ..phase import Draws, Loss, Phase
from ..rollout import backward_simulation


@dataclass(frozen=True)
class Config:
    """Constants of DMD2.

    Args:
        guidance: of the teacher, None for its own; the fake score is never guided (paper: 1.75 for SD1.5, 8 for SDXL).
        student_every: fake-score updates per student update (paper: 10 SD1.5, 5 ImageNet-64 and SDXL).
        student_learning_rate: AdamW's.
        fake_learning_rate: AdamW's, for the fake-score network and its discriminator head.
        generator_weight: of the adversarial term in the student's loss (paper: 3e-3 ImageNet-64).
        discriminator_weight: of the adversarial term in the fake network's loss (paper: 1e-2).
        time_range: t of the score difference is uniform in it (paper: 0.02 to 0.98).
        warm_up_share: of the budget, spent first on regressing the teacher's samples from their noise (paper: for SDXL
            in one step); 0 leaves it out.
        pairs: of noise and sample, for the warm-up.
    """

    guidance: float | None = None
    student_every: int = 2
    student_learning_rate: float = 1e-4
    fake_learning_rate: float = 1e-4
    generator_weight: float = 3e-3
    discriminator_weight: float = 1e-2
    time_range: tuple[float, float] = (0.02, 0.98)
    warm_up_share: float = 0.0
    pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        at_least(1, student_every=self.student_every)
        above(0, student_learning_rate=self.student_learning_rate, fake_learning_rate=self.fake_learning_rate)
        at_least(0, generator_weight=self.generator_weight, discriminator_weight=self.discriminator_weight)
        rising(0, 1, time_range=self.time_range)
        below_one(warm_up_share=self.warm_up_share)


@dataclass(frozen=True)
class Networks:
    """The three networks, all in the same latent space and process.

    Args:
        student: becomes the few-step generator; a copy of the teacher.
        teacher: frozen, guided.
        fake: predicts `x_0` of noised student samples; a copy of the teacher.
        feature_block: the block inside the fake network whose output the discriminator sees.
        head: turns those features into logits.
        times: the student's, `steps + 1` from 1 down to 0.
    """

    student: Copy
    teacher: DenoiserLike
    fake: Copy
    feature_block: nn.Module
    head: nn.Module
    times: tuple[float, ...]


def stages(task: Task, config: Config) -> Iterator[Stage]:
    """A warm-up of the student where it is asked for; then all three networks.

    Student and fake score begin as the teacher, the discriminator's head afresh.
    """
    student, fake = task.copy("student"), task.copy("fake")
    block, channels = task.feature_block(fake.network)
    head = FeatureHead(channels).to(task.device)
    times = tuple(uniform_times(task.steps))
    guidance = task.scale(config.guidance)
    networks = Networks(student, task.guided(guidance), fake, block, head, times)
    share = 1.0 - config.warm_up_share
    if config.warm_up_share:
        pairs = make_pairs(task, networks.teacher, "warm-up", config.pairs)
        phase = regression_phase(student, pairs, config.student_learning_rate)
        yield Stage("warm-up", student, [phase], "consistency", times, guidance, share=config.warm_up_share)
    panel = {"fake score": fake.denoiser}
    yield Stage("dmd2", student, phases(networks, config), "consistency", times, guidance, panel=panel, share=share)


def phases(networks: Networks, config: Config) -> list[Phase[ConditionedBatch]]:
    """The two time-scale update rule: fake score and discriminator always, the student every `student_every`-th."""

    def fake(batch: ConditionedBatch, draws: Draws) -> Loss:
        return fake_loss(networks, config, batch, draws)

    def student(batch: ConditionedBatch, draws: Draws) -> Loss:
        return student_loss(networks, config, batch, draws)

    judges = nn.ModuleDict({"fake": networks.fake.module, "head": networks.head})
    trained, every = networks.student.module, config.student_every
    return [
        Phase("fake", judges, fake, config.fake_learning_rate, betas=(0.0, 0.99)),
        Phase("student", trained, student, config.student_learning_rate, every, (0.0, 0.99)),
    ]


def student_loss(networks: Networks, config: Config, batch: ConditionedBatch, draws: Draws) -> Loss:
    """Distribution-matching term (eq. 2) plus the generator's side of the GAN (section 4.3).

    One noised sample serves both: the fake network's call that gives the score also gives the discriminator's features.
    """
    x = backward_simulation(networks.student.denoiser, batch.x_0.shape, networks.times, batch.condition, draws)
    t, eps = noise_level(x, config.time_range, draws.own)
    x_t = add_noise(networks.teacher.schedule, x, eps, t)
    mu_fake, logits = _score_and_logits(networks, x_t, t, batch.condition)
    with torch.no_grad():
        mu_real = networks.teacher(x_t, t, batch.condition).float()
    matching = gradient_loss(x, distribution_matching_gradient(x, mu_fake, mu_real))
    adversarial = generator_loss(logits)
    return matching + config.generator_weight * adversarial, {"matching": matching, "adversarial": adversarial}


def fake_loss(networks: Networks, config: Config, batch: ConditionedBatch, draws: Draws) -> Loss:
    """Denoising loss on student samples (eq. 6 of DMD) plus the discriminator's side of the GAN, in one call."""
    with torch.no_grad():
        x = backward_simulation(networks.student.denoiser, batch.x_0.shape, networks.times, batch.condition, draws)
    both = torch.cat([x, batch.x_0])
    t, eps = noise_level(both, config.time_range, draws.own)
    denoiser = networks.fake.denoiser
    x_t = add_noise(denoiser.schedule, both, eps, t)

    def call() -> Tensor:
        return denoiser.network(*denoiser.network_input(x_t, t), twice(batch.condition))

    output, features = call_with_features(networks.feature_block, call)
    target = denoiser.from_sample(both, x_t, t)
    denoising = functional.mse_loss(output[: len(x)].float(), target[: len(x)])
    on_fake, on_real = networks.head(features).float().chunk(2)
    adversarial = discriminator_loss(on_fake, on_real)
    loss = denoising + config.discriminator_weight * adversarial
    logged = {"denoising": denoising, "adversarial": adversarial, "accuracy": accuracy(on_fake, on_real)}
    return loss, logged


def _score_and_logits(networks: Networks, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    fake = networks.fake.denoiser
    mu_fake, features = call_with_features(networks.feature_block, lambda: fake(x_t, t, condition).float())
    return mu_fake, networks.head(features).float()
