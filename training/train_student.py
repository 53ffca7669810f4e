"""`fewstep train METHOD`: from a teacher and its data to a student of a fixed number of steps."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.artefact import Card, read_card, save_artefact
from ..runtime.errors import FewstepError
from ..runtime.families import Model, family_of, load_model
from ..runtime.files import read_json, write_json
from .checkpoint import Progress
from .copies import FullCopies, LoRACopies, merged, save_adapter
from .distribution import is_main_process
from .latents import LatentData, load_latent_data, show_samples
from .method import Stage, Task
from .methods import get_method
from .panel import show_predictions
from .recipe import StudentRecipe
from .trainer import train
from .watchdog import watch_stage

Cost = Mapping[str, float]
"""What a stage took: `preparation_minutes` (of making pairs, say), `minutes` and `iterations` of training."""


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
    origin = {"teacher": card.weights, "data": latent_data.identity}
    stage, costs = _train_stages(method, task, recipe, latent_data, origin)
    if is_main_process():
        save_student(out, stage, teacher, card, method, latent_data, recipe, costs)


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


def _train_stages(
    method: str, task: Task, recipe: StudentRecipe[Any], latent_data: LatentData, origin: Mapping[str, Any]
) -> tuple[Stage, dict[str, Cost]]:
    """Train each stage when the one before is done; the last holds the student."""
    whole = asdict(recipe)
    begun_with = {**whole, "method": {"name": method, **whole["method"]}, **origin}
    last: Stage | None = None
    costs: dict[str, Cost] = {}
    for seconds, stage in _timed(get_method(method).stages(task, recipe.method)):
        preparation = _add_preparation(task.folder / "preparation.json", stage.name, seconds)
        progress = _train_stage(stage, task, recipe, latent_data, begun_with)
        costs[stage.name] = {
            "preparation_minutes": round(preparation / 60, 2),
            "minutes": round(progress.seconds / 60, 2),
            "iterations": progress.step,
        }
        last = stage
    assert last is not None, f"{method} has no stage"
    return last, costs


def _timed(stages: Iterable[Stage]) -> Iterator[tuple[float, Stage]]:
    """Each stage after the seconds that it took to get it."""
    asked = time.monotonic()
    for stage in stages:
        yield time.monotonic() - asked, stage
        asked = time.monotonic()


def _add_preparation(path: Path, stage: str, seconds: float) -> float:
    """Seconds that a stage's preparation has taken, in earlier runs of the same command too."""
    spent = read_json(path) if path.exists() else {}
    spent[stage] = spent.get(stage, 0.0) + seconds
    if is_main_process():
        write_json(path, spent)
    return float(spent[stage])


def _train_stage(
    stage: Stage, task: Task, recipe: StudentRecipe[Any], latent_data: LatentData, begun_with: Mapping[str, Any]
) -> Progress:
    def show(step: int) -> list[Path]:
        guidance = stage.guidance if stage.guidance_range else None
        samples, predictions = task.folder / "samples.png", task.folder / "predictions.png"
        show_samples(stage.student.denoiser, stage.sampler, stage.times, latent_data, samples, guidance=guidance)
        show_predictions(stage, task, latent_data, predictions)
        return [samples, predictions]

    trainer = replace(
        recipe.trainer,
        minutes=recipe.trainer.minutes * stage.share,
        iterations=max(1, round(recipe.trainer.iterations * stage.share)),
    )
    folder = task.folder if stage.share == 1 else task.folder / stage.name
    watchdog, phases, averages = watch_stage(recipe.watchdog, stage, task), stage.phases, stage.averages
    student = stage.student.module
    try:
        return train(phases, latent_data.batches, student, trainer, folder, show, averages, begun_with, watchdog)
    finally:  # what it saw matters most where training failed
        if watchdog.checks and is_main_process():
            write_json(folder / "watchdog.json", watchdog.report())


def save_student(
    out: Path,
    stage: Stage,
    teacher: Path,
    teacher_card: Card,
    method: str,
    latent_data: LatentData,
    recipe: StudentRecipe[Any],
    costs: Mapping[str, Cost],
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
        "cost": dict(costs),
    }
    if stage.guidance_range:
        card["guidance_range"] = list(stage.guidance_range)

    def write(folder: Path) -> None:
        family_of(teacher).save_student(folder, merged(stage.student), teacher, stage.sampler)
        if recipe.lora_rank:
            save_adapter(stage.student, folder / "lora")

    save_artefact(out, write, card)
