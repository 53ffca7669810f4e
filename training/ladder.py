"""The ladder: every method with one teacher, at one budget, evaluated beside the teacher's own solvers.

Each rung is trained and evaluated by the same functions as the commands `fewstep train` and `fewstep evaluate`; what is
finished is not done again, and what was interrupted goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.artefact import INDEX, read_card
from ..runtime.errors import FewstepError
from ..runtime.pipeline import DEFAULT_TEACHER_STEPS, Pipeline
from .checks import above, at_least
from .data.packed import load_captioned_images
from .evaluation.evaluate import floors
from .evaluation.features import FeatureNetwork
from .evaluation.model import Setting, evaluate_once, evaluation_progress
from .evaluation.split import Split, open_split
from .methods import METHODS, get_method
from .recipe import StudentRecipe
from .train_student import train_student

STEPS = (1, 2, 4)
SOLVERS = ("ddim", "dpm++2m")


@dataclass(frozen=True)
class LadderConfig:
    """What a ladder trains and measures.

    Args:
        methods: names in `methods.METHODS`; all of them when empty.
        minutes: of training, for each student.
        count: images an evaluation.
        seeds: each student is trained with as many, counting up from 0.
    """

    methods: tuple[str, ...] = ()
    minutes: float = 8.0
    count: int = 2000
    seeds: int = 1

    def __post_init__(self) -> None:
        for name in self.methods:
            get_method(name)
        above(0, minutes=self.minutes)
        at_least(1, seeds=self.seeds)


def climb(teacher: Path, data: Path, out: Path, config: LadderConfig, device: torch.device) -> list[dict[str, Any]]:
    """Train and evaluate what is missing.

    Args:
        teacher: directory of the teacher of all students.
        data: the captioned data set that it was trained on.
        out: gets a folder a student.
        config: methods and budget.
        device: where to train and evaluate.

    Returns:
        The evaluations: of the teacher at its reference setting, of its solvers at few steps, then of every student;
        each with `model`, its directory's name, `method` and `kind`, and the `minutes` that its model took to make.

    Raises:
        FewstepError: the teacher or the data cannot be read, or a training fails.
    """
    network = FeatureNetwork().to(device)
    with evaluation_progress() as report:
        split = open_split(data, "train", network, report)
    floors(split, config.count)  # before the long part, for it may find too few images
    identity = load_captioned_images(data, "train").identity
    entries = _evaluations(teacher, split, network, _solver_settings(config), device)
    rungs = ((method, seed) for method in config.methods or METHODS for seed in _seeds(out, method, config))
    for method, seed in rungs:
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


def _seeds(out: Path, method: str, config: LadderConfig) -> range:
    """The seeds that are asked for, and those whose students are there already."""
    students = (card.parent for card in out.glob(f"{method}-[0-9]*-seed-*/{INDEX}"))
    found = [int(student.name.rpartition("-")[2]) for student in students]
    return range(max([config.seeds - 1, *found]) + 1)


def student_recipe(method: str, steps: int, seed: int, config: LadderConfig) -> StudentRecipe[Any]:
    """A method's default recipe, within the ladder's budget."""
    recipe: StudentRecipe[Any] = StudentRecipe(get_method(method).Config(), steps=steps)
    return replace(recipe, trainer=replace(recipe.trainer, minutes=config.minutes, seed=seed))


def _finished(student: Path, recipe: StudentRecipe[Any], data: str, teacher: Path) -> bool:
    """Whether a student is there already.

    Raises:
        FewstepError: it is, but was made otherwise than it would be now.
    """
    if not (student / INDEX).is_file():
        return False
    raw = read_card(student).raw
    wanted = {"data": data, "teacher": read_card(teacher).weights, "minutes": recipe.trainer.minutes}
    made = {
        "data": raw["data"]["identity"],
        "teacher": raw["teacher"]["weights"],
        "minutes": raw["recipe"]["trainer"]["minutes"],
    }
    for name, value in wanted.items():
        if made[name] != value:
            raise FewstepError(
                f"{student} was made with {name} {made[name]}, not {value}: remove it, or give another --out"
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
    more = {"model": directory.name, "method": card.method, "kind": card.kind, "minutes": _minutes(card.raw)}
    return [entry | more for entry in entries]


def _minutes(card: Mapping[str, Any]) -> float:
    """What a model took to make, pairs and other preparations included."""
    if "cost" not in card:
        return float(card["recipe"]["trainer"]["minutes"])
    return float(sum(stage["preparation_minutes"] + stage["minutes"] for stage in card["cost"].values()))
