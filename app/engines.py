"""`fewstep engines`: what lies beside a student, what of it would run, and what may go."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import FewstepError
from .models import SHIPPED_STUDENT
from .tables import Column, Row, print_table

if TYPE_CHECKING:
    from ..runtime.engines.store import StoredEngine

app = typer.Typer(help="List, verify, refit and remove the engines of students.", no_args_is_help=True)
Directories = Annotated[
    list[Path] | None, typer.Argument(help="Students' directories.", show_default="the shipped student")
]
MEGABYTE = 1_000_000
COLUMNS = (
    Column("student", "student"),
    Column("target", "target"),
    Column("precision", "precision"),
    Column("steps", "steps"),
    Column("size", "size", "{:.1f} MB"),
    Column("last used", "last_used"),
    Column("state", "state"),
)


@app.command("list")
def list_(directories: Directories = None) -> None:
    """Show every engine, the most recently used first, without reading the graphs."""
    _print(_engines(directories, thorough=False))


@app.command()
def verify(directories: Directories = None) -> None:
    """Read every engine whole as loading does, say which would be refused and why, and exit with 1 if any is."""
    engines = _engines(directories, thorough=True)
    _print(engines)
    refused = [engine for engine in engines if engine.reason]
    for engine in refused:
        typer.echo(engine.reason)
    if refused:
        raise typer.Exit(1)


@app.command()
def prune(
    directories: Directories = None,
    gib: Annotated[
        float | None,
        typer.Option(help="What a student's engines may take, in GiB.", show_default="$FEWSTEP_ENGINES_GIB or 16"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what is stale or damaged, then the longest unused beyond a size; what another machine built is usable."""
    from ..runtime.engines.store import GIB, engines_bound, exclusive, remove_engine, surplus

    if gib is not None and not gib > 0:
        raise FewstepError(f"no engine fits into {gib:g} GiB: give --gib above 0")
    bound = engines_bound() if gib is None else gib * GIB
    for directory in directories or [SHIPPED_STUDENT]:
        if dry_run:
            for engine in surplus(directory, bound):
                typer.echo(f"would go: {engine.reason}")
            continue
        with exclusive(directory):
            for engine in surplus(directory, bound):
                remove_engine(engine.folder)
                typer.echo(f"gone: {engine.reason}")


@app.command()
def refit(
    student: Annotated[Path, typer.Argument(help="The student's directory, which has a tensorrt engine.")],
    lora: Annotated[Path, typer.Option(help="Safetensors file of the LoRA, as peft and diffusers write it.")],
    out: Annotated[Path, typer.Option(help="Directory for the student with the LoRA and its engine.")],
    precision: Annotated[
        str | None, typer.Option(help="Of the engine.", show_default="the fastest that this machine can")
    ] = None,
) -> None:
    """Add a LoRA to a student and to its tensorrt engine, whose weights are replaced in seconds instead of a build."""
    from ..export.refit import refit_engine

    typer.echo(refit_engine(student, lora, out, precision))


def _engines(directories: list[Path] | None, thorough: bool) -> list["StoredEngine"]:
    from ..runtime.engines.store import list_engines

    return [engine for directory in directories or [SHIPPED_STUDENT] for engine in list_engines(directory, thorough)]


def _print(engines: Sequence["StoredEngine"]) -> None:
    if not engines:
        typer.echo("there is no engine: make one with `fewstep export`")
        return
    print_table(COLUMNS, [_row(engine) for engine in engines])


def _row(engine: "StoredEngine") -> Row:
    used = datetime.datetime.fromtimestamp(engine.last_used)
    return {
        "student": engine.folder.parent.parent.name,
        "target": engine.target,
        "precision": engine.precision,
        "steps": engine.steps or "any",
        "size": engine.size / MEGABYTE,
        "last_used": f"{used:%Y-%m-%d %H:%M}",
        "state": engine.state,
    }
