"""The benchmark's table and its picture of quality against latency, as HTML and SVG drawn from its JSON."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ...runtime.errors import FewstepError
from ...runtime.files import read_json
from ..pareto import PANELS, front
from ..tables import Row
from .cards import escaped, hint

COST = "milliseconds_batch_1"
COMMAND = "fewstep bench --data DIR"
WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 446, 34, 272
"""Edges of the plot inside the picture."""
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def benchmark(file: Path) -> str:
    """Two pictures and a table; or one line that says which command makes what is missing."""
    if not file.is_file():
        return hint(f"There is no {file.name} yet: `{COMMAND}` makes it.")
    try:
        content = read_json(file)
        rows: list[Row] = [row for row in content["rows"] if row.get("fd") is not None]
        if not rows:
            return hint(f"{file.name} has times only: `{COMMAND}` adds the quality.")
        where = (
            f"{content['machine']['processor']}, {content['machine']['date']}, commit {content['machine']['commit']}"
        )
        panels = "".join(_panel(rows, *panel) for panel in PANELS)
        return f'<div class="charts">{panels}</div>{_table(rows)}<p class="hint">{escaped(where)}</p>'
    except (FewstepError, KeyError, TypeError, ValueError):
        return hint(f"{file.name} is not what `{COMMAND}` writes: run it again.")


def _panel(rows: Sequence[Row], score: str, title: str, sign: int) -> str:
    """One score against milliseconds, every series a line or its points, the Pareto front dashed."""
    scale = _Scale([float(row[COST]) for row in rows], [float(row[score]) for row in rows])
    best = scale.path(_stairs(front([(row[COST], row[score]) for row in rows], sign)))
    parts, labels = [_axes(scale, score), f'<path class="front" d="{best}"/>'], _Labels()
    for kind, sampler in dict.fromkeys((row["kind"], row["sampler"]) for row in rows):
        chosen = sorted(
            (row for row in rows if (row["kind"], row["sampler"]) == (kind, sampler)), key=lambda row: row[COST]
        )
        points = [(float(row[COST]), float(row[score])) for row in chosen]
        if kind == "teacher":
            parts.append(f'<path class="teacher" d="{scale.path(points)}"/>')
        parts += [_point(scale, labels, row, point) for row, point in zip(chosen, points, strict=True)]
    name = escaped(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} against milliseconds">'
        f'<text class="title" x="{LEFT}" y="18">{name}</text>{"".join(parts)}'
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">milliseconds, prompt to PNG</text></svg>'
    )


class _Scale:
    """Milliseconds, logarithmic, and scores to places in the picture, with some room around."""

    def __init__(self, costs: Sequence[float], scores: Sequence[float]) -> None:
        self.costs = min(costs) / 1.5, max(costs) * 1.5
        room = (max(scores) - min(scores)) * 0.12 or 1.0
        self.scores = max(0.0, min(scores) - room), max(scores) + room

    def place(self, cost: float, score: float) -> tuple[float, float]:
        low, high = map(math.log, self.costs)
        across = (math.log(cost) - low) / (high - low)
        up = (score - self.scores[0]) / (self.scores[1] - self.scores[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        places = [self.place(*point) for point in points]
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _stairs(best: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What one point costs and gives is to be had until the next one; in between there is nothing."""
    corners = [(after[0], before[1]) for before, after in pairwise(best)]
    return [point for pair in zip(best, [*corners, best[-1]], strict=True) for point in pair]


def _axes(scale: _Scale, score: str) -> str:
    parts = []
    for tick in TICKS:
        if scale.costs[0] <= tick <= scale.costs[1]:
            x, _ = scale.place(tick, scale.scores[0])
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{tick:,}</text>')
    low, high = scale.scores
    step = _round_step((high - low) / 4)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        _, y = scale.place(scale.costs[0], number * step)
        label = f"{number * step:.0%}" if score == "match_at_1" else f"{number * step:g}"
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return f'<g class="axes">{"".join(parts)}</g>'


def _round_step(size: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size)


class _Labels:
    """Short texts that do not cover each other: above their points, else below, else left out."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float, float]] = []

    def place(self, text: str, x: float, y: float) -> str:
        """The text at a point, or nothing where there is no room."""
        half = 4 * len(text) + 2
        for baseline in (y - 9, y + 19):
            if all(abs(x - other) > half + wide or abs(baseline - row) > 12 for other, row, wide in self._taken):
                self._taken.append((x, baseline, half))
                return f'<text x="{x:.1f}" y="{baseline:.1f}" text-anchor="middle">{escaped(text)}</text>'
        return ""


def _point(scale: _Scale, labels: _Labels, row: Row, point: tuple[float, float]) -> str:
    x, y = scale.place(*point)
    note = labels.place(str(row["engine"] if row["kind"] == "student" else row["steps"]), x, y)
    title = escaped(f"{row['label']}: {point[0]:,.1f} ms")
    mark = f'<title>{title}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>{note}'
    return f'<g class="{escaped(str(row["kind"]))}">{mark}</g>'


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "ms", "faster", "FD", "match@1"))
    body = "".join(
        f'<tr class="{escaped(str(row["kind"]))}"><th>{escaped(str(row["label"]))}</th><td>{row[COST]:,.1f}</td>'
        f"<td>{row['speedup_batch_1']:.0f}×</td><td>{row['fd']:.1f}</td><td>{row['match_at_1']:.0%}</td></tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
