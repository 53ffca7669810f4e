"""The `fewstep` program: one verb a module; every failure a person can mend is one sentence and exit code 2."""

import os
import sys
from typing import NoReturn

import typer

from ..runtime.errors import FewstepError
from . import data, doctor, engines, evaluate, export, generate, ladder, load, report, train
from .bench.command import bench
from .demo.command import demo
from .serve import command as serve

INTERRUPTED = 130
"""What Typer exits with after Ctrl-C."""

app = typer.Typer(
    help="Distil diffusion and flow models to one to four steps, prove them, export them, use them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.command("export")(export.export)
app.add_typer(engines.app, name="engines")
app.command("doctor")(doctor.doctor)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench)
app.command("ladder")(ladder.ladder)
app.command("report")(report.report)
app.command("load")(load.load)
app.command("serve")(serve.serve)
app.command("key")(serve.key)
app.command("demo")(demo)


def main() -> None:
    """Run the program; the console script's entry point."""
    # Spinning OpenMP threads slow everything else on a shared machine; OpenMP reads this when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except FewstepError as error:
        _stop(str(error))
    except OSError as error:  # a full disk, a folder that is a file: whatever a check before the work cannot rule out
        if error.filename is None:
            raise
        _stop(f"cannot read or write {error.filename}: {error.strerror}")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("fewstep: interrupted; a training goes on from its last checkpoint when run again", file=sys.stderr)
        raise


def _stop(sentence: str) -> NoReturn:
    print(f"fewstep: {sentence}", file=sys.stderr)
    sys.exit(2)
