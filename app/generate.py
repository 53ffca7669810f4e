"""`fewstep generate`: prompts to PNG files."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.edit import DEFAULT_STRENGTH
from ..runtime.engines import COMPILED, ENGINES, TORCH
from ..runtime.errors import FewstepError
from ..runtime.wording import either, in_steps
from .models import SHIPPED_STUDENT

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..runtime.pipeline import Pipeline, Result


def generate(
    prompt: Annotated[str, typer.Argument(help='What to draw, such as "a red rocket, fluent 3d style".')],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG file; several images get -1, -2, ... before the suffix.")
    ],
    model: Annotated[Path, typer.Option(help="Model directory.", show_default="the shipped student")] = SHIPPED_STUDENT,
    steps: Annotated[
        int | None, typer.Option(help="Network evaluations; a student takes only those it was made for.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; one seed gives one image.")] = 0,
    count: Annotated[int, typer.Option(help="Images to make, with seeds counting up.")] = 1,
    engine: Annotated[
        str, typer.Option(help=f"{either(('auto', TORCH, COMPILED, *ENGINES))}; auto takes the fastest of them here.")
    ] = "auto",
    teacher: Annotated[Path | None, typer.Option(help="Also let this teacher draw, and compare the times.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from; torch draws then.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="With --image: between 0 and 1, how little of it stays.", show_default=f"{DEFAULT_STRENGTH}"),
    ] = None,
) -> None:
    """Draw a prompt in one to four steps; with --teacher, beside the model it was distilled from."""
    from ..runtime.pipeline import Pipeline

    files = output_files(output, count)
    start: dict[str, Any] = {"image": open_picture(image), "strength": strength} if image or strength else {}
    pipeline = Pipeline.from_pretrained(model, engine)
    rival = Pipeline.from_pretrained(teacher, "torch") if teacher else None
    student_seconds = _draw(pipeline, prompt, steps, seed, files, start)
    if rival:
        beside = [file.with_name(f"{file.stem}.teacher{file.suffix}") for file in files]
        teacher_seconds = _draw(rival, prompt, None, seed, beside, start)
        typer.echo(f"the student is {teacher_seconds / student_seconds:.0f} times faster")


def output_files(output: Path, count: int) -> list[Path]:
    """The PNG files of `count` images, checked to be writable before anything is generated.

    Raises:
        FewstepError: the suffix is not .png, the folder is missing or not writable, or the count is below 1.
    """
    if count < 1:
        raise FewstepError(f"{count} images are not possible: give --count of at least 1")
    if output.suffix.lower() != ".png":
        raise FewstepError(f"{output} is not a PNG file name: end it in .png")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK) or output.is_dir():
        raise FewstepError(f"cannot write {output}: its folder must exist and be writable")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]


def open_picture(path: Path | None) -> "Image | None":
    """Read a picture.

    Raises:
        FewstepError: it is none.
    """
    from PIL import Image, UnidentifiedImageError

    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FewstepError(f"{path} is no picture that can be read: give a PNG, JPEG or WebP file") from error
    except OSError as error:
        raise FewstepError(f"cannot read {path}: {error.strerror or error}") from error


def _draw(
    pipeline: "Pipeline", prompt: str, steps: int | None, seed: int, files: list[Path], start: Mapping[str, Any]
) -> float:
    """Generate into `files` and print how; returns seconds an image, prompt to PNG, after one warm-up."""
    pipeline.generate(prompt, steps=steps, seed=seed, **start)
    started = time.perf_counter()
    result = pipeline.generate(prompt, steps=steps, seed=seed, count=len(files), **start)
    save_images(result, files)
    seconds = (time.perf_counter() - started) / len(files)
    names = ", ".join(str(file) for file in files)
    how = f"{pipeline.card.kind}, {in_steps(result.steps)}"
    typer.echo(f"{names}: {how}, {1000 * seconds:.1f} ms an image on {result.engine}")
    return seconds


def save_images(result: "Result", files: list[Path]) -> None:
    """Write each image as PNG, whole or not at all."""
    from ..runtime.files import atomic_path

    for image, file in zip(result.images, files, strict=True):
        with atomic_path(file) as temporary:
            image.save(temporary, format="PNG", compress_level=1)
