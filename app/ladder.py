"""`fewstep ladder`: every method with one teacher at one budget, beside the teacher's own solvers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.files import atomic_path, write_json
from .claims import SOLVERS, checked_claims, rung_scores
from .machine import machine
from .pareto import save_pareto
from .report import network_evaluations
from .tables import SCORES, Column, Row, markdown_table, print_table, replace_section

COLUMNS = (
    Column("method", "method"),
    Column("sampler", "sampler"),
    Column("steps", "steps"),
    Column("evaluations", "evaluations"),
    *(Column(column.title, column.name) for column in SCORES),
    Column("beside solvers", "beside_solvers", "{:.2f}"),
    Column("seeds", "seeds"),
    Column("minutes", "minutes", "{:.0f}"),
)
SUMMARY = tuple(column for column in COLUMNS if column.title not in ("KID", "coverage", "seeds"))
LEGEND = """\
*evaluations*: of the network, for one image; guidance doubles those of a teacher. *beside solvers*: FD divided by that
of the teacher's best training-free solver at as many steps. *minutes*: of making this model alone, pairs included. With
several seeds a score is their mean, and half their range follows.
"""


def ladder(
    teacher: Annotated[Path, typer.Option(help="Directory of the teacher of all students.")],
    data: Annotated[Path, typer.Option(help="The captioned pictures that it was trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for the students; what is finished there is kept.")],
    results: Annotated[Path | None, typer.Option(help="Folder for ladder.json, ladder.md and ladder.png.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown page with a section for the table.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated methods; default: all.")] = "",
    minutes: Annotated[float, typer.Option(help="Training of each student.")] = 8.0,
    count: Annotated[int, typer.Option(min=2, help="Images an evaluation.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each student, with seeds counting up from 0.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
) -> None:
    """Train and evaluate every method at one budget; run the same command again to go on."""
    from ..training.ladder import LadderConfig, climb
    from ..training.numerics import training_device

    chosen = tuple(name.strip() for name in methods.split(",") if name.strip())
    config = LadderConfig(chosen, minutes, count, seeds)
    entries = climb(teacher, data, out, config, training_device(device, threads))
    rows = summarise(entries)
    print_table(COLUMNS, rows, f"{count} images, {entries[0]['data'][:8]}")
    for finding in checked_claims(entries):
        print(finding)
    if results:
        write_json(results / "ladder.json", {"machine": machine(), "rows": rows, "evaluations": entries})
        _write(rows, entries, results)
    if readme:
        replace_section(readme, "ladder", _summary(rows, entries, count))


def summarise(entries: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a method and step count: the scores' means over the seeds, with half their range as the spread."""
    groups: dict[tuple[str, str, int, float], list[Row]] = {}
    for entry in entries:
        key = (entry["method"], entry["sampler"], entry["steps"], entry["guidance"])
        groups.setdefault(key, []).append(entry)
    return [
        {
            "method": method,
            "sampler": sampler,
            "steps": steps,
            "evaluations": network_evaluations(group[0]["kind"], steps, sampler, guidance),
            "beside_solvers": _beside_solvers(group, entries),
            "seeds": len(group),
            "minutes": statistics.mean(entry["minutes"] for entry in group),
            **{score.name: spread(score, group) for score in SCORES},
        }
        for (method, sampler, steps, guidance), group in groups.items()
    ]


def _beside_solvers(group: Sequence[Row], entries: Sequence[Row]) -> float | None:
    """A student's FD divided by that of the teacher's best solver at as many steps."""
    solvers = rung_scores(entries, (SOLVERS, group[0]["steps"]), "fd")
    students = [entry["fd"] for entry in group if entry["kind"] == "student" and entry.get("fd") is not None]
    return statistics.mean(students) / solvers[0] if students and solvers else None


def spread(score: Column, group: Sequence[Row]) -> str | None:
    """The mean of a score, and for several seeds half its range: `12.3`, or `12.3 ± 0.4`."""
    values = [entry[score.name] for entry in group if entry.get(score.name) is not None]
    if not values:
        return None
    mean = score.pattern.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {score.pattern.format((max(values) - min(values)) / 2)}"


def _write(rows: Sequence[Row], entries: Sequence[Row], results: Path) -> None:
    points = [
        {
            **entry,
            "evaluations": network_evaluations(entry["kind"], entry["steps"], entry["sampler"], entry["guidance"]),
            "series": entry["method"] if entry["kind"] == "student" else f"teacher, {entry['sampler']}",
            "note": str(entry["steps"]),
        }
        for entry in entries
    ]
    save_pareto(points, "evaluations", "network evaluations an image", results / "ladder.png")
    text = [
        markdown_table(COLUMNS, rows),
        LEGEND,
        "What the papers claim on their data:\n",
        *checked_claims(entries),
        "",
    ]
    with atomic_path(results / "ladder.md") as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")


def _summary(rows: Sequence[Row], entries: Sequence[Row], count: int) -> str:
    """What a front page shows: the shorter table, where and when it was measured, and the claims."""
    made_on = machine()
    caption = f"{count:,} images a row; {made_on['processor']}, {made_on['date']}, commit {made_on['commit']}."
    return "\n".join([markdown_table(SUMMARY, rows), caption, "", *checked_claims(entries)])
