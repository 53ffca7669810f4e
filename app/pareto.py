"""Quality against cost: a picture of what is to be had at which price."""

from collections.abc import Sequence
from pathlib import Path

from .tables import Row

PANELS = (("fd", "FD-EffLite0 (lower is better)", -1), ("match_at_1", "match@1 (higher is better)", 1))
"""Score, title, and the sign that makes higher better."""


def front(points: Sequence[tuple[float, float]], sign: int = 1) -> list[tuple[float, float]]:
    """The points (cost, score) that no other equals or betters at no more cost, cheapest first.

    Args:
        points: any number, in any order.
        sign: 1 if a higher score is better, -1 if a lower one is.
    """
    kept: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * score > sign * kept[-1][1]:
            kept.append((cost, score))
    return kept


def save_pareto(rows: Sequence[Row], cost: str, title: str, path: Path) -> None:
    """Plot FD-EffLite0 and match@1 against a cost, with the front of all rows dashed, as PNG.

    Args:
        rows: with `cost`, the scores that are known, `kind`, `series` and `note`; each series of a teacher is a line.
        cost: name of the cost.
        title: what to call it.
        path: the file.
    """
    from matplotlib.figure import Figure

    from ..runtime.files import atomic_path

    panels = [panel for panel in PANELS if any(row.get(panel[0]) is not None for row in rows)]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for position, (score, name, sign) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), position)
        scored = [row for row in rows if row.get(score) is not None]
        for series in dict.fromkeys(row["series"] for row in scored):
            chosen = sorted((row for row in scored if row["series"] == series), key=lambda row: float(row[cost]))
            look = "o-" if chosen[0]["kind"] == "teacher" else "*"
            size = 5 if look == "o-" else 12
            axes.plot([row[cost] for row in chosen], [row[score] for row in chosen], look, ms=size, lw=1, label=series)
            for row in chosen:
                axes.annotate(row["note"], (row[cost], row[score]), (5, 4), textcoords="offset points", fontsize=7)
        best = front([(row[cost], row[score]) for row in scored], sign)
        # What one point costs and gives is to be had until the next one; in between there is nothing.
        axes.plot(*zip(*best, strict=True), "--", drawstyle="steps-post", color="grey", lw=1, label="Pareto front")
        axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
