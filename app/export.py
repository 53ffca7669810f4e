"""`fewstep export`: a student becomes an engine, or the reason why not is given."""

from pathlib import Path
from typing import Annotated

import typer

from .models import SHIPPED_STUDENT


def export(
    directory: Annotated[
        Path, typer.Argument(help="The student's directory.", show_default="the shipped student")
    ] = SHIPPED_STUDENT,
    to: Annotated[str, typer.Option(help="onnx or openvino.")] = "openvino",
    steps: Annotated[int | None, typer.Option(help="Step count, for a student that knows several.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16; default: the target's fastest that passes parity.")
    ] = None,
) -> None:
    """Write the whole trajectory as one graph beside the student, after comparing its images with torch's."""
    from ..export.export import export_student

    typer.echo(export_student(directory, to, steps, precision))
