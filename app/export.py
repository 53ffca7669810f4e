"""`fewstep export`: a student becomes an engine or several, or the reason why not is given."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import FewstepError
from .models import SHIPPED_STUDENT

if TYPE_CHECKING:
    from ..export.export import Request


def export(
    directory: Annotated[
        Path, typer.Argument(help="The student's directory.", show_default="the shipped student")
    ] = SHIPPED_STUDENT,
    to: Annotated[
        list[str] | None, typer.Option(help="onnx or openvino; give it again for several.", show_default="openvino")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every target whose library is installed.")] = False,
    steps: Annotated[int | None, typer.Option(help="Step count, for a student that knows several.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16; default: the target's fastest that passes parity.")
    ] = None,
) -> None:
    """Write the whole trajectory as one graph beside the student, after comparing its images with torch's."""
    from ..export.export import check_request, export_source
    from ..export.source import Source

    if to and every:
        raise FewstepError("--all exports to every target: leave --to out, or give --to alone")
    requests = _every(precision) if every else [check_request(target, precision) for target in to or ["openvino"]]
    source, refused = Source(directory, steps), False
    for request in requests:
        try:
            typer.echo(export_source(source, request))
        except FewstepError as error:
            typer.echo(f"fewstep: {error}", err=True)
            refused = True
    if refused:
        raise typer.Exit(2)


def _every(precision: str | None) -> list["Request"]:
    """All targets that this machine can build; the others are named with what they lack."""
    from ..export.export import TARGETS, check_request

    requests = []
    for target in TARGETS:
        try:
            requests.append(check_request(target, precision))
        except FewstepError as error:
            typer.echo(f"fewstep: passed over {target}: {error}", err=True)
    if not requests:
        raise FewstepError("no target can be built here: install one of those libraries")
    return requests
