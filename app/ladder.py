"""`fewstep ladder`: every method on one data set at one budget, beside the teacher's own solvers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.files import atomic_path, write_json
from .pareto import save_pareto
from .report import network_evaluations
from .tables import SCORES, Column, Row, markdown_table, print_table

CLAIMS = {
    "consistency": "1 step behind progressive distillation's, 2 steps ahead (arXiv 2303.01469)",
    "dmd2": "1 step at or below the teacher's own FID (1.28 against 2.35, arXiv 2405.14867)",
    "lcm": "1-4 steps ahead of the teacher's solvers (arXiv 2310.04378)",
    "progressive": "4 steps close to the teacher's many (arXiv 2202.00512)",
    "rectified-flow": "1 step ahead of the unreflowed flow's (arXiv 2209.03003)",
    "rectified-flow-plus": "ahead of plain reflow at 1 step (arXiv 2405.20320)",
    "scott": "ahead of LCM at 1-2 steps, and more diverse (arXiv 2403.01505)",
}
"""What each method's paper claims, to be read beside our numbers."""
COLUMNS = (
    Column("method", "method"),
    Column("sampler", "sampler"),
    Column("steps", "steps"),
    Column("evaluations", "evaluations"),
    *(Column(column.title, column.name) for column in SCORES),
    Column("seeds", "seeds"),
    Column("minutes", "minutes"),
)


def ladder(
    data: Annotated[Path, typer.Option(help="Captioned pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for the models; what is finished there is kept.")],
    results: Annotated[Path | None, typer.Option(help="Folder for ladder.json, ladder.md and ladder.png.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated methods; default: all.")] = "",
    minutes: Annotated[float, typer.Option(help="Training of each student.")] = 8.0,
    teacher_minutes: Annotated[float, typer.Option(help="Training of the teacher.")] = 30.0,
    autoencoder_minutes: Annotated[float, typer.Option(help="Training of the autoencoder.")] = 10.0,
    count: Annotated[int, typer.Option(min=2, help="Images an evaluation.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each student, with seeds counting up from 0.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
) -> None:
    """Train and evaluate every method at one budget; run the same command again to go on."""
    from ..training.ladder import LadderConfig, climb
    from ..training.numerics import training_device

    chosen = tuple(name.strip() for name in methods.split(",") if name.strip())
    budgets = LadderConfig(chosen, minutes, teacher_minutes, autoencoder_minutes, count, tuple(range(seeds)))
    entries = climb(data, out, budgets, training_device(device, threads))
    rows = summarise(entries)
    print_table(COLUMNS, rows, f"{count} images, {entries[0]['data'][:8]}")
    if results:
        write_json(results / "ladder.json", {"rows": rows, "evaluations": entries})
        _write(rows, entries, results)


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
            "seeds": len(group),
            "minutes": f"{group[0]['minutes']:g}",
            **{score.name: spread(score, group) for score in SCORES},
        }
        for (method, sampler, steps, guidance), group in groups.items()
    ]


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
    claims = [
        f"- {method}: {claim}" for method, claim in CLAIMS.items() if any(row["method"] == method for row in rows)
    ]
    text = [markdown_table(COLUMNS, rows), "What the papers claim, on their data:", "", *claims, ""]
    with atomic_path(results / "ladder.md") as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
