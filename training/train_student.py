"""`fewstep train dmd2`: from a teacher and its data to a student of a fixed number of steps."""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.artefact import Card, read_card, save_artefact
from ..runtime.denoiser import Condition, Denoiser
from ..runtime.errors import FewstepError
from ..runtime.families import Model, family_of, load_model
from ..runtime.schedule import uniform_times
from .distribution_matching import FeatureHead
from .latents import LatentData, load_latent_data, show_samples
from .methods.dmd2 import DMD2Config, DMD2Networks, dmd2_phases
from .trainer import TrainerConfig, train

SAMPLER = "consistency"
"""Students predict `x_0` at each of their times and re-noise in between."""


def train_dmd2(
    teacher: Path,
    data: Path,
    out: Path,
    steps: int,
    method: DMD2Config,
    trainer: TrainerConfig,
    batch_size: int,
    device: torch.device,
) -> None:
    """Distil `teacher` into a student of `steps` network evaluations and save it at `out`.

    Args:
        teacher: directory of a teacher.
        data: the captioned data set, for prompts and for the discriminator's real side.
        out: the student's directory; `out/training` holds what training leaves behind.
        steps: 1 to 8.
        method: constants; its times are replaced by `steps` evenly spaced ones.
        trainer: budget and optimisation.
        batch_size: samples a phase.
        device: where to train.

    Raises:
        FewstepError: the teacher or the data cannot be read, the step count is out of range, or the loss diverges.
    """
    if not 1 <= steps <= 8:
        raise FewstepError(f"{steps} steps are not possible for a few-step student: give 1 to 8")
    card = read_card(teacher)
    if card.kind != "teacher":
        raise FewstepError(f"{teacher} is a student: give the directory of a teacher")
    method = replace(method, times=tuple(uniform_times(steps)))
    model = load_model(teacher, device)
    latent_data = load_latent_data(data, model, batch_size, trainer.seed, device)
    torch.manual_seed(trainer.seed)
    networks = dmd2_networks(model, teacher, latent_data.negative)
    networks.head.to(device)

    def show(average: nn.Module, step: int) -> None:
        denoiser = replace(networks.student_denoiser, network=family_of(teacher).network_call(average))
        show_samples(denoiser, SAMPLER, method.times, latent_data, out / "training" / "samples.png")

    phases = dmd2_phases(networks, method)
    trained = train(phases, latent_data.batches, networks.student, trainer, out / "training", show)
    show(trained, 0)
    recipe = {"method": asdict(method), "trainer": asdict(trainer), "batch_size": batch_size}
    save_student(out, trained, teacher, card, method.times, method.guidance, "dmd2", latent_data, recipe)


def dmd2_networks(model: Model, teacher: Path, negative: Condition) -> DMD2Networks:
    """Student and fake score as copies of the teacher, and a fresh discriminator head."""
    family = family_of(teacher)

    def copied() -> tuple[nn.Module, Denoiser]:
        network = copy.deepcopy(model.network).train().requires_grad_(True)
        return network, replace(model.denoiser, network=family.network_call(network))

    student, student_denoiser = copied()
    fake, fake_denoiser = copied()
    block, channels = family.feature_block(fake)
    return DMD2Networks(
        student, student_denoiser, model.denoiser, fake_denoiser, fake, block, FeatureHead(channels), negative
    )


def save_student(
    out: Path,
    network: nn.Module,
    teacher: Path,
    teacher_card: Card,
    times: tuple[float, ...],
    guidance: float,
    method: str,
    latent_data: LatentData,
    recipe: dict[str, Any],
) -> None:
    """Write a student's directory: its network, the teacher's decoder, and how it is to be sampled."""
    steps = len(times) - 1
    card = {
        "kind": "student",
        "method": method,
        "steps": [steps],
        "times": {str(steps): list(times)},
        "sampler": SAMPLER,
        "guidance": guidance,
        "teacher": {"weights": teacher_card.weights},
        "data": latent_data.identity,
        "recipe": recipe,
    }
    family = family_of(teacher)
    save_artefact(out, lambda folder: family.save_student(folder, network, teacher, steps), card)
