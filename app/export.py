"""`fewstep export`: a model becomes an engine or several, or the reason why not is given."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.engines import ENGINES, PRECISIONS
from ..runtime.errors import FewstepError
from ..runtime.wording import either
from .match import score_if_possible
from .models import SHIPPED_STUDENT

if TYPE_CHECKING:
    from ..export.export import Exportable, Request

DEFAULT_TARGET = "openvino"


def export(
    directory: Annotated[
        Path,
        typer.Argument(
            help="The student's directory, or with --shape parts a teacher's.", show_default="the shipped student"
        ),
    ] = SHIPPED_STUDENT,
    to: Annotated[
        list[str] | None,
        typer.Option(help=f"{either(ENGINES)}; give it again for several.", show_default=DEFAULT_TARGET),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every target whose library is installed.")] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            help="fused: a step count's whole trajectory as one graph; or parts: each network as one, for every step "
            "count and sampler, laid out as Hugging Face optimum does.",
            show_default="fused, or parts for a model with text encoders of its own",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Step count, for a student that knows several.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="; ".join(f"{target}: {either(precisions)}" for target, precisions in PRECISIONS.items())
            + "; as far as this machine can.",
            show_default="the target's first that it can",
        ),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Keep our kernels: nodes in onnx in fp32, plugins in tensorrt.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Pictures it was trained on: in few bits, its match@1 on them must not fall.")
    ] = None,
) -> None:
    """Write the graphs of a model beside it, after comparing its images with torch's."""
    from ..export.export import check_request, export_source, open_source
    from ..export.source import Source

    if to and every:
        raise FewstepError("--all exports to every target: leave --to out, or give --to alone")
    named = [] if every else [check_request(target, precision) for target in to or [DEFAULT_TARGET]]
    source, refused = open_source(directory, shape, steps, kernels), False
    if source.steps is None and shape is None:
        typer.echo(f"{directory} has text encoders of its own: it is exported in parts, for every step count", err=True)
    for request in named or _every(source, precision):
        try:
            score = score_if_possible(source, request.precision, data) if isinstance(source, Source) else None
            typer.echo(export_source(source, request, score))
        except FewstepError as error:
            typer.echo(f"fewstep: {error}", err=True)
            refused = True
    if refused:
        raise typer.Exit(2)


def _every(source: "Exportable", precision: str | None) -> list["Request"]:
    """All targets of the source's shape that this machine can build; the others are named with what they lack."""
    from ..export.export import TARGETS, check_request

    requests = []
    for target in TARGETS:
        try:
            source.require_target(target)
            requests.append(check_request(target, precision))
        except FewstepError as error:
            typer.echo(f"fewstep: passed over {target}: {error}", err=True)
    if not requests:
        raise FewstepError("no target can be built here: install one of those libraries")
    return requests
