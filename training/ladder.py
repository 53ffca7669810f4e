"""The ladder: every method on one data set, at one budget, evaluated beside the teacher's own solvers.

Each rung is trained and evaluated by the same functions as the commands `fewstep train` and `fewstep evaluate`; what is
finished is not done again, and what was interrupted goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..runtime.artefact import INDEX, read_card
from ..runtime.errors import FewstepError
from ..runtime.pipeline import DEFAULT_TEACHER_STEPS, Pipeline
from .data.packed import load_captioned_images
from .evaluation.evaluate import floors
from .evaluation.features import FeatureNetwork
from .evaluation.model import Setting, evaluate_once, evaluation_progress
from .evaluation.split import Split, open_split
from .methods import METHODS, get_method
from .recipe import AutoencoderRecipe, Recipe, StudentRecipe, TeacherRecipe
from .train_autoencoder import train_autoencoder
from .train_student import train_student
from .train_teacher import train_teacher

STEPS = (1, 2, 4)
SOLVERS = ("ddim", "dpm++2m")


@dataclass(frozen=True)
class LadderConfig:
    """Budgets of a ladder.

    Args:
        methods: names in `methods.METHODS`; all of them when empty.
        minutes: of training, for each student.
        teacher_minutes: of training, for the teacher.
        autoencoder_minutes: of training, for the autoencoder.
        count: images an evaluation.
        seeds: each student is trained once for each.
    """

    methods: tuple[str, ...] = ()
    minutes: float = 8.0
    teacher_minutes: float = 30.0
    autoencoder_minutes: float = 10.0
    count: int = 2000
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in self.methods:
            get_method(name)
        if min(self.minutes, self.teacher_minutes, self.autoencoder_minutes) <= 0:
            raise FewstepError("every budget of the ladder must be more than 0 minutes")


def climb(data: Path, out: Path, config: LadderConfig, device: torch.device) -> list[dict[str, Any]]:
    """Train and evaluate what is missing.

    Args:
        data: a captioned data set.
        out: folder of the ladder: `autoencoder`, `teacher`, and a folder a student.
        config: budgets.
        device: where to train and evaluate.

    Returns:
        The evaluations: of the teacher at its reference setting, of its solvers at few steps, then of every student;
        each with `model`, its directory's name, `method` and `kind`, and the `minutes` of its training.

    Raises:
        FewstepError: the data cannot be read, or a training fails.
    """
    network = FeatureNetwork().to(device)
    with evaluation_progress() as report:
        split = open_split(data, "train", network, report)
    floors(split, config.count)  # before the long part, for it may find too few images
    identity = load_captioned_images(data, "train").identity
    teacher = _teacher(data, identity, out, config, device)
    entries = _evaluations(teacher, split, network, _solver_settings(config), device)
    for method, seed in product(config.methods or METHODS, config.seeds):
        served: set[int] = set()
        for steps in sorted(STEPS, reverse=True):
            if steps in served:
                continue
            student, recipe = out / f"{method}-{steps}-seed-{seed}", student_recipe(method, steps, seed, config)
            if not _finished(student, recipe, identity, teacher):
                train_student(method, teacher, data, student, recipe, device)
            counts = [count for count in STEPS if count in read_card(student).steps and count not in served]
            settings = [Setting(config.count, steps=count) for count in counts]
            entries += _evaluations(student, split, network, settings, device)
            served.update(counts)
    return entries


def student_recipe(method: str, steps: int, seed: int, config: LadderConfig) -> StudentRecipe[Any]:
    """A method's default recipe, within the ladder's budget."""
    recipe: StudentRecipe[Any] = StudentRecipe(get_method(method).Config(), steps=steps)
    return _lasting(recipe, config.minutes, seed)


def _teacher(data: Path, identity: str, out: Path, config: LadderConfig, device: torch.device) -> Path:
    autoencoder, teacher = out / "autoencoder", out / "teacher"
    if not (autoencoder / "vae").is_dir():
        train_autoencoder(data, autoencoder, _lasting(AutoencoderRecipe(), config.autoencoder_minutes), device)
    recipe = _lasting(TeacherRecipe(), config.teacher_minutes)
    if not _finished(teacher, recipe, identity):
        train_teacher(data, autoencoder, teacher, recipe, device)
    return teacher


def _lasting(recipe: Recipe, minutes: float, seed: int = 0) -> Recipe:
    """The recipe with another budget and seed."""
    plain: Any = recipe
    lasting: Recipe = replace(plain, trainer=replace(plain.trainer, minutes=minutes, seed=seed))
    return lasting


def _finished(directory: Path, recipe: Any, data: str, teacher: Path | None = None) -> bool:
    """Whether a model is there already.

    Raises:
        FewstepError: it is, but was made otherwise than it would be now.
    """
    if not (directory / INDEX).is_file():
        return False
    raw = read_card(directory).raw
    wanted = {
        "data": data,
        "teacher": read_card(teacher).weights if teacher else None,
        "minutes": recipe.trainer.minutes,
    }
    made = {
        "data": raw["data"]["identity"],
        "teacher": raw["teacher"]["weights"] if teacher else None,
        "minutes": raw["recipe"]["trainer"]["minutes"],
    }
    for name, value in wanted.items():
        if made[name] != value:
            raise FewstepError(
                f"{directory} was made with {name} {made[name]}, not {value}: remove it, or give another --out"
            )
    return True


def _solver_settings(config: LadderConfig) -> list[Setting]:
    few = [Setting(config.count, steps=steps, sampler=solver) for solver in SOLVERS for steps in STEPS]
    return [Setting(config.count, steps=DEFAULT_TEACHER_STEPS), *few]


def _evaluations(
    directory: Path, split: Split, network: FeatureNetwork, settings: Sequence[Setting], device: torch.device
) -> list[dict[str, Any]]:
    pipeline = Pipeline.from_pretrained(directory, "torch", device.type)
    with evaluation_progress() as report:
        entries = [evaluate_once(pipeline, split, network, setting, report) for setting in settings]
    card = pipeline.card
    minutes = card.raw["recipe"]["trainer"]["minutes"]
    more = {"model": directory.name, "method": card.method, "kind": card.kind, "minutes": minutes}
    return [entry | more for entry in entries]
