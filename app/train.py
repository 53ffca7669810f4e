"""`fewstep train`: autoencoder, teacher and students; every option is a field of a recipe."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import typer

from ..runtime.errors import require
from ..training.methods import METHODS

if TYPE_CHECKING:
    import torch


def succeeded(_: None) -> None:
    """After every training that raised nothing."""
    from ..training.distribution import end_process

    end_process()


app = typer.Typer(
    help="Train an autoencoder, a teacher or a student; run the same command again to go on.",
    no_args_is_help=True,
    result_callback=succeeded,
)
OPTIONS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What follows a training's name is read from the fields of its recipe."""

Recipe = TypeVar("Recipe")


@dataclass(frozen=True, kw_only=True)
class Training(Generic[Recipe]):
    """What every training is told.

    Args:
        data: captioned pictures: a built data set, a folder, or WebDataset shards.
        out: directory to write; its folder training/ holds checkpoint, curve and samples.
        settings: the recipe.
        recipe: YAML file shaped as the settings, which replaces their defaults; options win over it.
        device: cpu, cuda, or auto.
        threads: CPU threads; 0: torch's choice.
    """

    data: Path
    out: Path
    settings: Recipe
    recipe: Path | None = None
    device: str = "auto"
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining(Training[Recipe]):
    """Train the small autoencoder whose latents the built-in teacher works in."""


@dataclass(frozen=True, kw_only=True)
class TeacherTraining(Training[Recipe]):
    """Train a text-conditional flow-matching teacher.

    Args:
        autoencoder: directory that `fewstep train autoencoder` wrote.
    """

    autoencoder: Path


@dataclass(frozen=True, kw_only=True)
class StudentTraining(Training[Recipe]):
    """Distil a teacher into a student of one to eight steps.

    Args:
        teacher: directory of the teacher.
    """

    teacher: Path


@app.command("autoencoder", context_settings=OPTIONS, add_help_option=False)
def train_autoencoder(context: typer.Context) -> None:
    """The small autoencoder whose latents the built-in teacher works in."""
    from ..training.recipe import AutoencoderRecipe
    from ..training.train_autoencoder import train_autoencoder

    given = read_options(context, AutoencoderTraining[AutoencoderRecipe], AutoencoderRecipe())
    train_autoencoder(given.data, given.out, given.settings, device_of(given))


@app.command("teacher", context_settings=OPTIONS, add_help_option=False)
def train_teacher(context: typer.Context) -> None:
    """A text-conditional flow-matching teacher."""
    from ..training.recipe import TeacherRecipe
    from ..training.train_teacher import train_teacher

    given = read_options(context, TeacherTraining[TeacherRecipe], TeacherRecipe())
    train_teacher(given.data, given.autoencoder, given.out, given.settings, device_of(given))


def student_command(name: str) -> Callable[[typer.Context], None]:
    """The command of one method."""

    def command(context: typer.Context) -> None:
        from ..training.methods import get_method
        from ..training.recipe import StudentRecipe
        from ..training.train_student import train_student

        config: Any = get_method(name).Config
        given = read_options(context, StudentTraining[StudentRecipe[config]], StudentRecipe(config()))
        train_student(name, given.teacher, given.data, given.out, given.settings, device_of(given))

    return command


for method, summary in METHODS.items():
    app.command(method, help=f"A student by {summary}.", context_settings=OPTIONS, add_help_option=False)(
        student_command(method)
    )


def read_options(context: typer.Context, kind: Any, recipe: Any) -> Any:
    """Fill a dataclass from the command line: options over `--recipe`'s file over the defaults of `recipe`.

    Raises:
        FewstepError: the recipe's file cannot be read or does not fit.
    """
    tyro = require("tyro", "train")
    from ..training.recipe import read_recipe

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe", type=Path)
    if file := finder.parse_known_args(context.args)[0].recipe:
        recipe = read_recipe(file, recipe)
    places = [field.name for field in fields(kind.__origin__) if field.default is MISSING and field.name != "settings"]
    default = kind(**dict.fromkeys(places, tyro.MISSING), settings=recipe)
    return tyro.cli(
        kind, prog=context.command_path, args=context.args, default=default, config=(tyro.conf.OmitArgPrefixes,)
    )


def device_of(given: Any) -> "torch.device":
    """The device to train on, with the number of CPU threads set."""
    from ..training.numerics import training_device

    return training_device(given.device, given.threads)
