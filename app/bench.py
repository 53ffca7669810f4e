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
PICTURES = 12
SCORES = ("fd", "kid", "precision", "recall", "coverage", "match_at_1", "match_style_at_1", "images")


def bench(
    student: Annotated[Path, typer.Argument(help="The student's directory.")] = SHIPPED_STUDENT,
    teacher: Annotated[Path, typer.Option(help="Its teacher's directory.")] = SHIPPED_TEACHER,
    data: Annotated[Path | None, typer.Option(help="Also evaluate every contender against these pictures.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for bench.json and, with --data, the plot and the pictures.")
    ] = Path("results"),
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each contender.")] = 10,
    count: Annotated[int, typer.Option(min=12, help="Images for the evaluation.")] = 500,
) -> None:
    """Time student and teacher in turns on every engine, beside the teacher's own few-step solvers."""
    from rich.progress import Progress

    from ..runtime.errors import require
    from ..runtime.files import write_json
    from .bench_report import print_table, save_plot
    from .contenders import contenders, measure

    if data is not None:
        require("matplotlib", "eval")  # for the plot, which comes last
    listed = contenders(student, teacher)
    with Progress() as progress:
        task = progress.add_task("timing", total=None)
        measure(listed, BATCHES, rounds, lambda done, total: progress.update(task, completed=done, total=total))
    rows = [_row(contender, listed[0], _quality(contender, data, count)) for contender in listed]
    write_json(out / "bench.json", {"machine": _machine(), "rounds": rounds, "rows": rows})
    if data is not None:
        save_plot(rows, out / "bench.png")
        _save_pictures(listed[0], listed[-1], data, out / "teacher-and-student.png")
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


def _save_pictures(teacher: "Contender", student: "Contender", data: Path, path: Path) -> None:
    """The first captions of the evaluation: real pictures, the teacher's, the student's, with the same seeds."""
    from ..training.data.packed import load_captioned_images
    from ..training.evaluation.evaluate import prompt_positions
    from ..training.evaluation.sheet import save_sheet

    images = load_captioned_images(data, "train")
    positions = prompt_positions(len(images.captions), PICTURES)
    captions = [images.captions[position][0] for position in positions]
    rows = {"real": images.images[positions].permute(0, 2, 3, 1).numpy()}
    for contender in (teacher, student):
        result = contender.pipeline.generate(captions, contender.steps, range(PICTURES), sampler=contender.sampler)
        rows[contender.label] = result.arrays
    save_sheet(rows, captions, path)


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
