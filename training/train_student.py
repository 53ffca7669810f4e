"""`fewstep train METHOD`: from a teacher and its data to a student of a fixed number of steps."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.artefact import Card, read_card, save_artefact
from ..runtime.errors import FewstepError
from ..runtime.families import Model, family_of, load_model
from ..runtime.files import write_json
from .copies import FullCopies, LoRACopies, merged, save_adapter
from .distribution import is_main_process
from .latents import LatentData, load_latent_data, show_samples
from .method import Stage, Task
from .methods import get_method
from .recipe import StudentRecipe
from .trainer import train
from .watchdog import watch_stage


def train_student(
    method: str, teacher: Path, data: Path, out: Path, recipe: StudentRecipe[Any], device: torch.device
) -> None:
    """Distil `teacher` into a student and save it at `out`.

    Args:
        method: a name in `methods.METHODS`.
        teacher: directory of a teacher.
        data: the captioned data set, for prompts and real pictures.
        out: the student's directory; `out/training` holds what training leaves behind.
        recipe: steps, budget, optimisation, and the method's own constants.
        device: where to train.

    Raises:
        FewstepError: the teacher or the data cannot be read, or the loss diverges.
    """
    card = read_card(teacher)
    if card.kind != "teacher":
        raise FewstepError(f"{teacher} is a student: give the directory of a teacher")
    model = load_model(teacher, device)
    latent_data = load_latent_data(data, model, recipe.batch_size, recipe.trainer.seed, device)
    torch.manual_seed(recipe.trainer.seed)
    task = make_task(model, teacher, card, latent_data, out, recipe, device)
    stage = _train_stages(method, task, recipe, latent_data)
    if is_main_process():
        save_student(out, stage, teacher, card, method, latent_data, recipe)


def make_task(
    model: Model,
    teacher: Path,
    card: Card,
    latent_data: LatentData,
    out: Path,
    recipe: StudentRecipe[Any],
    device: torch.device,
) -> Task:
    """What a method is given, for a teacher on disk."""
    family, rank = family_of(teacher), recipe.lora_rank
    return Task(
        teacher=model.denoiser,
        negative=latent_data.negative,
        guidance=card.guidance,
        steps=recipe.steps,
        sample_shape=model.sample_shape,
        batches=latent_data.batches,
        copy=LoRACopies(model, family, rank) if rank else FullCopies(model, family),
        feature_block=family.feature_block,
        decoder=model.decoder,
        folder=out / "training",
        device=device,
    )


def _train_stages(method: str, task: Task, recipe: StudentRecipe[Any], latent_data: LatentData) -> Stage:
    """Train each stage when the one before is done; the last holds the student."""
    last = None
    for stage in get_method(method).stages(task, recipe.method):
        last = _train_stage(stage, task, recipe, latent_data)
    assert last is not None, f"{method} has no stage"
    return last


def _train_stage(stage: Stage, task: Task, recipe: StudentRecipe[Any], latent_data: LatentData) -> Stage:
    def show(step: int) -> None:
        guidance = stage.guidance if stage.guidance_range else None
        path = task.folder / "samples.png"
        show_samples(stage.student.denoiser, stage.sampler, stage.times, latent_data, path, guidance=guidance)

    trainer = replace(
        recipe.trainer,
        minutes=recipe.trainer.minutes * stage.share,
        iterations=max(1, round(recipe.trainer.iterations * stage.share)),
    )
    folder = task.folder if stage.share == 1 else task.folder / stage.name
    watchdog, phases, averages = watch_stage(recipe.watchdog, stage, task), stage.phases, stage.averages
    student = stage.student.module
    try:
        train(phases, latent_data.batches, student, trainer, folder, show, averages, asdict(recipe), watchdog)
    finally:  # what it saw matters most where training failed
        if is_main_process():
            write_json(folder / "watchdog.json", watchdog.report())
    return stage


def save_student(
    out: Path,
    stage: Stage,
    teacher: Path,
    teacher_card: Card,
    method: str,
    latent_data: LatentData,
    recipe: StudentRecipe[Any],
) -> None:
    """Write a student's directory: its network, the teacher's decoder, and how it is to be sampled."""
    times = {len(each) - 1: list(each) for each in (stage.times, *stage.other_times)}
    card: dict[str, Any] = {
        "kind": "student",
        "method": method,
        "steps": list(times),
        "times": {str(count): each for count, each in times.items()},
        "sampler": stage.sampler,
        "guidance": stage.guidance,
        "teacher": {"weights": teacher_card.weights},
        "data": latent_data.identity,
        "recipe": asdict(recipe),
    }
    if stage.guidance_range:
        card["guidance_range"] = list(stage.guidance_range)

    def write(folder: Path) -> None:
        family_of(teacher).save_student(folder, merged(stage.student), teacher, stage.sampler)
        if recipe.lora_rank:
            save_adapter(stage.student, folder / "lora")

    save_artefact(out, write, card)
