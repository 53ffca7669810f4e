"""Draws what `run.py` measured: `picture.py FOLDER` puts PNGs beside the JSON."""

import json
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows_of(folder: Path, section: str) -> list[Row]:
    """The rows of a section, none where it was not measured."""
    file = folder / f"{section}.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return rows


def draw_kernels(rows: list[Row], file: Path) -> None:
    """The fraction of the ceiling of every kernel and shape, as bars, beside the best of the others as ticks."""
    labels = [f"{row['operation']}, {row['model']}, {row['where']}, {row['pass']}" for row in rows]
    figure, axes = _figure(12, 1 + 0.2 * len(rows))
    axes.barh(range(len(rows)), [row["fraction_of_ceiling"] for row in rows], label="kernel")
    axes.plot([_best_other(row) for row in rows], range(len(rows)), "k|", label="fastest other")
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.set_ylim(len(rows), -1)
    axes.set_xlabel("fraction of the ceiling: a copy of as many bytes, or a matrix product")
    axes.axvline(1, color="grey")
    axes.legend(loc="lower right")
    _save(figure, file)


def _best_other(row: Row) -> float:
    """The fraction of the ceiling that the fastest other implementation of the same operation reaches."""
    times = row["microseconds"]
    others = [value for name, value in times.items() if name not in ("kernel", "copy", "sdpa without tangent")]
    return float(row["fraction_of_ceiling"] * times["kernel"] / min(others))


def draw_generation(rows: list[Row], file: Path) -> None:
    """Images a second of every student, batch and number of steps, by variant."""
    groups: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if "images_per_second" in row:
            name = f"{row['student']}, batch {row['batch']}, {row['steps']} steps"
            groups[name][row["variant"]] = row["images_per_second"]
    variants = list(dict.fromkeys(variant for group in groups.values() for variant in group))
    figure, axes = _figure(10, 1 + 0.18 * len(groups) * len(variants))
    height = 1 / (len(variants) + 1)
    for place, variant in enumerate(variants):
        found = {at + place * height: group[variant] for at, group in enumerate(groups.values()) if variant in group}
        axes.barh(list(found), list(found.values()), height=height, label=variant)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("images a second")
    axes.legend()
    _save(figure, file)


def draw_training(rows: list[Row], file: Path) -> None:
    """The curves of the losses with kernels (dashed) and without, one axis for each training."""
    names = list(dict.fromkeys((row["method"], row["batch"]) for row in rows))
    figure, grid = _figure(5 * len(names), 4, columns=len(names))
    for name, axes in zip(names, grid, strict=True):
        for row in rows:
            if (row["method"], row["batch"]) == name:
                _draw_curves(axes, row["curve"], "--" if row["kernels"] else "-")
        axes.set_title(f"{name[0]}, batch {name[1]}; dashed: with kernels")
        axes.set_xlabel("iteration")
        axes.legend(fontsize=6)
    _save(figure, file)


def _draw_curves(axes: Any, curve: list[dict[str, float]], style: str) -> None:
    """Every scalar whose name ends in `loss`."""
    for place, name in enumerate(sorted({name for point in curve for name in point if name.endswith("loss")})):
        points = [(point["step"], point[name]) for point in curve if name in point]
        axes.plot(*zip(*points, strict=True), style, color=f"C{place}", label=name)


def _figure(width: float, height: float, columns: int = 0) -> Any:
    """A figure and its axes, a list of them if columns are asked for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    if not columns:
        return figure, figure.add_subplot()
    return figure, [figure.add_subplot(1, columns, place + 1) for place in range(columns)]


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    print(f"drew {file}")


PICTURES = {"kernels": draw_kernels, "end_to_end": draw_generation, "training": draw_training}


def main(folder: Path) -> None:
    """Draw what there is."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: no pictures were drawn")
        return
    for section, draw in PICTURES.items():
        if rows := rows_of(folder, section):
            draw(rows, folder / f"{section}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
