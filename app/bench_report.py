"""What a benchmark shows: a table in the terminal and a plot of quality against latency."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

Row = dict[str, Any]


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows, the reference first."""
    table = Table(
        Column("model", min_width=10),
        "ms, batch 1",
        "faster",
        "engine alone",
        "ms, batch 8",
        "faster",
        "FD-EffLite0",
        "match@1",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        table.add_row(
            row["label"],
            f"{row['milliseconds_batch_1']:.1f}",
            f"{row['speedup_batch_1']:.1f}x",
            f"{row['engine_milliseconds_batch_1']:.1f}",
            f"{row['milliseconds_batch_8']:.1f}",
            f"{row['speedup_batch_8']:.1f}x",
            f"{row['fd']:.1f}" if "fd" in row else "",
            f"{100 * row['match_at_1']:.0f}%" if "match_at_1" in row else "",
        )
    Console().print(table)


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Plot FD-EffLite0 and match@1 against milliseconds an image, prompt to PNG, at batch 1."""
    from matplotlib.figure import Figure

    from ..runtime.files import atomic_path

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (("fd", "FD-EffLite0 (lower is better)"), ("match_at_1", "match@1 (higher is better)"))
    for position, (name, title) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, position)
        for family, marker, size in (("ddim", "s", 45), ("dpm++2m", "^", 45), ("student", "*", 140)):
            chosen = [row for row in rows if family in row["label"]]
            label = "student" if family == "student" else f"teacher, {family}"
            points = [(row["milliseconds_batch_1"], row[name]) for row in chosen]
            milliseconds, scores = zip(*points, strict=True)
            axes.scatter(milliseconds, scores, size, marker=marker, label=label)
            for row, point in zip(chosen, points, strict=True):
                note = row["label"].rsplit(", ", 1)[-1] if family == "student" else str(row["steps"])
                axes.annotate(note, point, (5, 4), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds, prompt to PNG, batch 1")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
