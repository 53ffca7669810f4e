"""`fewstep bench`: a student beside its teacher, in milliseconds and in quality."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..machine import machine
from ..models import SHIPPED_STUDENT, SHIPPED_TEACHER
from ..tables import SCORES, Column, print_table
from .environments import ENVIRONMENTS

if TYPE_CHECKING:
    from ...runtime.pipeline import Pipeline
    from ...training.evaluation.features import FeatureNetwork
    from ...training.evaluation.split import Split
    from .contenders import Contender

BATCHES = (1, 8)
PICTURES = 12
COLUMNS = (
    Column("model", "label"),
    Column("ms, batch 1", "milliseconds_batch_1", "{:.1f}"),
    Column("faster", "speedup_batch_1", "{:.1f}x"),
    Column("engine alone", "engine_milliseconds_batch_1", "{:.1f}"),
    Column("ms, batch 8", "milliseconds_batch_8", "{:.1f}"),
    Column("faster", "speedup_batch_8", "{:.1f}x"),
    *(score for score in SCORES if score.name in ("fd", "match_at_1")),
)


def bench(
    student: Annotated[
        Path, typer.Argument(help="The student's directory.", show_default="the shipped student")
    ] = SHIPPED_STUDENT,
    teacher: Annotated[
        Path, typer.Option(help="Its teacher's directory.", show_default="the shipped teacher")
    ] = SHIPPED_TEACHER,
    data: Annotated[Path | None, typer.Option(help="Also evaluate every contender against these pictures.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for bench.json and, with --data, the plot and the pictures.")
    ] = Path("results"),
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each contender.")] = 10,
    count: Annotated[int, typer.Option(min=12, help="Images for the evaluation.")] = 500,
    engines: Annotated[
        bool, typer.Option("--engines", help="Only the student, on every engine, with load time and memory.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Only the student, beside diffusers and optimum: results/peers.")
    ] = False,
    subject: Annotated[
        list[str] | None,
        typer.Option(help="With --peers: student, sd-1.5-tiny or sd-1.5-kl; give it again for several."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --peers: threads of every contender.", show_default="torch's")
    ] = None,
    environments: Annotated[
        Path, typer.Option(help="With --peers: where the environments of `make peers` lie.")
    ] = ENVIRONMENTS,
) -> None:
    """Time student and teacher in turns on every engine, beside the teacher's own few-step solvers."""
    if engines:
        _bench_engines(student, out, rounds)
        return
    if peers:
        _bench_peers(student, subject or ["student"], environments, rounds, threads, out / "peers")
        return
    from rich.progress import Progress

    from ...runtime.errors import require
    from ...runtime.files import write_json
    from ..pareto import save_pareto
    from .contenders import contenders, measure

    if data is not None:
        require("matplotlib", "eval")  # for the plot, which comes last
    listed = contenders(student, teacher)
    opened = _open_data(data, listed[0].pipeline) if data is not None else None
    with Progress() as progress:
        task = progress.add_task("timing", total=None)
        measure(listed, BATCHES, rounds, lambda done, total: progress.update(task, completed=done, total=total))
    rows = [_row(contender, listed[0]) for contender in listed]
    if opened:
        _evaluate(listed, rows, *opened, count)
        _save_pictures(listed[0], listed[-1], opened[0], out / "teacher-and-student.png")
        save_pareto(
            [_point(row) for row in rows],
            "milliseconds_batch_1",
            "milliseconds, prompt to PNG, batch 1",
            out / "bench.png",
        )
    write_json(out / "bench.json", {"machine": machine(), "rounds": rounds, "rows": rows})
    print_table(COLUMNS, rows)


def _bench_engines(student: Path, out: Path, rounds: int) -> None:
    from rich.progress import Progress

    from ...runtime.files import write_json
    from .engine_table import COLUMNS as ENGINE_COLUMNS
    from .engine_table import engine_table

    with Progress() as progress:
        task = progress.add_task("timing", total=None)
        rows = engine_table(student, rounds, lambda done, total: progress.update(task, completed=done, total=total))
    write_json(out / "engines.json", {"machine": machine(), "rounds": rounds, "rows": rows})
    print_table(ENGINE_COLUMNS, rows)


def _bench_peers(
    student: Path, subjects: Sequence[str], environments: Path, rounds: int, threads: int | None, out: Path
) -> None:
    from rich.progress import Progress

    from .peer_table import COLUMNS as PEER_COLUMNS
    from .peers import compare, save_comparison

    for name in subjects:
        with Progress() as progress:
            report = partial(progress.update, progress.add_task(name, total=None))
            entry = compare(
                name,
                student,
                environments,
                rounds,
                threads,
                lambda what, done, total: report(description=what, completed=done, total=total),  # noqa: B023
            )
        save_comparison(name, entry, out)
        print_table(PEER_COLUMNS, entry["rows"], f"{name}: {entry['how']}")


def _row(contender: "Contender", reference: "Contender") -> dict[str, Any]:
    from ...training.evaluation.model import Setting, drawing

    kind = contender.pipeline.card.kind
    how = drawing(contender.pipeline, Setting(steps=contender.steps, sampler=contender.sampler))
    row: dict[str, Any] = {"label": contender.label, "kind": kind, **how}
    for batch in BATCHES:
        end_to_end, engine = contender.median(batch)
        row[f"milliseconds_batch_{batch}"] = round(end_to_end, 3)
        row[f"engine_milliseconds_batch_{batch}"] = round(engine, 3)
        row[f"speedup_batch_{batch}"] = round(reference.median(batch)[0] / end_to_end, 2)
    return row


def _open_data(data: Path, pipeline: "Pipeline") -> tuple["Split", "FeatureNetwork"]:
    from ...training.evaluation.features import FeatureNetwork
    from ...training.evaluation.model import evaluation_progress
    from ...training.evaluation.split import open_split

    network = FeatureNetwork().to(pipeline.device)
    with evaluation_progress() as report:
        return open_split(data, "train", network, report), network


def _evaluate(
    listed: Sequence["Contender"],
    rows: Sequence[dict[str, Any]],
    split: "Split",
    network: "FeatureNetwork",
    count: int,
) -> None:
    """Add scores against the pictures of `split` to the rows; each engine of a student is scored by its own images."""
    from ...training.evaluation.model import Setting, evaluate_once, evaluation_progress

    names = [*(score.name for score in SCORES), "match_style_at_1", "images"]
    for contender, row in zip(listed, rows, strict=True):
        setting = Setting(count=count, steps=contender.steps, sampler=contender.sampler)
        with evaluation_progress() as report:
            entry = evaluate_once(contender.pipeline, split, network, setting, report)
        row |= {name: entry[name] for name in names}


def _point(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the plot calls it: each of the teacher's solvers by its steps, the student by its engines."""
    student = row["kind"] == "student"
    series = "student" if student else f"teacher, {row['sampler']}"
    return {**row, "series": series, "note": row["engine"] if student else str(row["steps"])}


def _save_pictures(teacher: "Contender", student: "Contender", split: "Split", path: Path) -> None:
    """The first captions of the evaluation: real pictures, the teacher's, the student's, with the same seeds."""
    from ...training.evaluation.sheet import save_sheet
    from ...training.evaluation.split import prompt_positions

    images = split.images
    positions = prompt_positions(len(images.captions), PICTURES)
    captions = [images.captions[position][0] for position in positions]
    rows = {"real": images.images[positions].permute(0, 2, 3, 1).numpy()}
    for contender in (teacher, student):
        result = contender.pipeline.generate(captions, contender.steps, range(PICTURES), sampler=contender.sampler)
        rows[contender.label] = result.arrays
    save_sheet(rows, captions, path)
