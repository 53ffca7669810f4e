"""`fewstep bench`: a student beside its teacher, in milliseconds and in quality."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .models import SHIPPED_STUDENT, SHIPPED_TEACHER

if TYPE_CHECKING:
    from .contenders import Contender

BATCHES = (1, 8)
SCORES = ("fd", "kid", "precision", "recall", "coverage", "match_at_1", "match_style_at_1", "images")


def bench(
    student: Annotated[Path, typer.Argument(help="The student's directory.")] = SHIPPED_STUDENT,
    teacher: Annotated[Path, typer.Option(help="Its teacher's directory.")] = SHIPPED_TEACHER,
    data: Annotated[Path | None, typer.Option(help="Also evaluate every contender against these pictures.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("results"),
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each contender.")] = 10,
    count: Annotated[int, typer.Option(min=12, help="Images for the evaluation.")] = 500,
) -> None:
    """Time student and teacher in turns on every engine, beside the teacher's own few-step solvers."""
    from rich.progress import Progress

    from ..runtime.files import write_json
    from .bench_report import print_table, save_plot
    from .contenders import contenders, measure, present_engines

    listed = contenders(student, teacher, present_engines(student))
    with Progress() as progress:
        task = progress.add_task("timing", total=None)
        measure(listed, BATCHES, rounds, lambda done, total: progress.update(task, completed=done, total=total))
    rows = [_row(contender, listed[0], _quality(contender, data, count)) for contender in listed]
    write_json(out / "bench.json", {"machine": _machine(), "rounds": rounds, "rows": rows})
    if data is not None:
        save_plot(rows, out / "bench.png")
    print_table(rows)


def _row(contender: "Contender", reference: "Contender", quality: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"label": contender.label, "steps": contender.steps, "kind": contender.pipeline.card.kind}
    for batch in BATCHES:
        end_to_end, engine = contender.median(batch)
        row[f"milliseconds_batch_{batch}"] = round(end_to_end, 3)
        row[f"engine_milliseconds_batch_{batch}"] = round(engine, 3)
        row[f"speedup_batch_{batch}"] = round(reference.median(batch)[0] / end_to_end, 2)
    return row | quality


def _quality(contender: "Contender", data: Path | None, count: int) -> dict[str, Any]:
    """Scores against the pictures of `data`; every engine of a student is scored through its own images."""
    if data is None:
        return {}
    from ..training.evaluation.model import evaluate_model

    engine = contender.pipeline.engine_name
    scores = evaluate_model(
        contender.directory, data, "train", count, contender.steps, contender.sampler, None, 0, engine, 32
    )
    return {name: getattr(scores, name) for name in SCORES}


def _machine() -> dict[str, Any]:
    import torch

    from ..runtime.engines.manifest import processor

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }
