"""`fewstep doctor`: how the installation is, and in one sentence each what to install or change."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Annotated

import typer

from ..runtime.engines.device import usable_processors
from . import hardware, packages, processor
from .findings import Finding, Verdict


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Read Python, packages, drivers, processor and threads; exit with 1 if anything is broken, rather than absent."""
    findings = list(examine())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{finding.verdict:<6}  {finding.subject}: {finding.sentence}")
    if any(finding.verdict is Verdict.BROKEN for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Everything that is looked at; what needs torch is left out where torch does not load."""
    yield packages.python()
    yield packages.core()
    yield from packages.overwritten(metadata.packages_distributions())
    broken = list(packages.loading())
    yield from broken
    if "torch" not in (finding.subject for finding in broken):
        gpu = hardware.find_gpu()
        yield hardware.torch_build(gpu)
        yield from hardware.triton(gpu)
        yield from hardware.onnxruntime(gpu)
        yield from hardware.openvino()
        yield from hardware.tensorrt(gpu)
    yield processor.instructions()
    yield from processor.threads(os.environ, *usable_processors())
    yield from packages.extras()
