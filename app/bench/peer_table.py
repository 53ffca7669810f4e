"""What `fewstep bench --peers` makes of its measurements: ratios with their spread, a table, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ..psnr import psnr
from ..tables import Column, markdown_table
from .contender import REFERENCE, slug

BATCHES = (1, 8)
LEAST_PSNR = 20.0
"""Below it, what was drawn is not the same picture, and times are not compared."""
EQUAL_PSNR = 100.0
"""Stands for pictures that are equal to the byte."""
COLUMNS = (
    Column("contender", "name"),
    *(
        column
        for batch in BATCHES
        for column in (
            Column(f"ms, batch {batch}", f"milliseconds_batch_{batch}", "{:.1f}"),
            Column("times ours (quartiles)", f"ratio_text_batch_{batch}"),
            Column("times ours on that engine", f"ratio_same_engine_batch_{batch}", "{:.2f}"),
        )
    ),
    Column("first call, ms", "first_call_milliseconds", "{:.0f}"),
    Column("load, s", "load_seconds", "{:.1f}"),
    Column("export, s", "export_seconds", "{:.0f}"),
    Column("peak, MiB", "peak_mebibytes", "{:.0f}"),
    Column("PSNR, dB", "psnr", "{:.1f}"),
    Column("not measured because", "reason"),
)


def add_comparisons(rows: Sequence[dict[str, Any]], batches: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Add to each row what sets it beside ours: the fastest at the first batch size, and that of the same library.

    Args:
        rows: with `name`, `ours`, and either `reason` or `seconds` and the medians.
        batches: sizes that were measured.
        folder: holds the pictures, as `.npy`.
    """
    rows = [_checked(row, folder) for row in rows]
    timed = {row["name"]: row for row in rows if "reason" not in row}
    ours = [row for row in timed.values() if row["name"] == row["ours"]]
    if not ours:
        return rows
    fastest = min(ours, key=lambda row: float(row[f"milliseconds_batch_{batches[0]}"]))
    for row in timed.values():
        row["fastest_of_ours"] = row is fastest
        for batch in batches:
            row |= _ratios(row, fastest, batch)
            if row["ours"] in timed:
                row[f"ratio_same_engine_batch_{batch}"] = _ratio(row, timed[row["ours"]], batch)
    return rows


def markdown(subjects: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of all subjects."""
    page = [f"# Beside what people use today\n\nMade by `fewstep bench --peers`. {_LEGEND}\n"]
    for name, subject in subjects.items():
        where = f"{subject['machine']['processor']}, {subject['machine']['cores']} cores, {subject['machine']['date']}"
        page.append(f"\n## {name}\n\n{subject['note']}\n\n{subject['how']} {where}.\n\n")
        page.append(markdown_table(COLUMNS, subject["rows"]))
    return "".join(page)


_LEGEND = (
    "Every contender has a process of its own with the same number of threads. *Times ours*: its median over that of "
    "our fastest engine at batch 1 (1.00), with the quartiles of the ratios of single rounds; above 1 is slower. "
    "*Times ours on that engine*: over ours on the same library in the same precision (diffusers beside torch, "
    "optimum-onnx beside onnx, optimum-intel beside openvino). Load: from a new process to ready. First call: batch 1, "
    "compilation included. Peak: the most that the process held. PSNR: of its pictures beside those of diffusers fp32 "
    "from the same noise; 100 means equal to the byte."
)


def save_bars(subjects: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw each contender's ratio to ours at batch 1, with quartiles, as PNG."""
    from matplotlib.figure import Figure

    from ...runtime.files import atomic_path

    heights = [sum("ratio_batch_1" in row for row in subject["rows"]) for subject in subjects.values()]
    figure = Figure(figsize=(8, 1.0 * len(heights) + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, subject) in zip(panels, subjects.items(), strict=True):
        rows = sorted((row for row in subject["rows"] if "ratio_batch_1" in row), key=lambda row: -row["ratio_batch_1"])
        ratios = [row["ratio_batch_1"] for row in rows]
        below, above = zip(*(row["ratio_quartiles_batch_1"] for row in rows), strict=True)
        spread = [
            [max(0.0, ratio - low) for ratio, low in zip(ratios, below, strict=True)],
            [max(0.0, high - ratio) for ratio, high in zip(ratios, above, strict=True)],
        ]
        colours = ["tab:blue" if row["name"].split(",")[0] == row["ours"] else "tab:grey" for row in rows]
        bars = axes.barh([row["name"] for row in rows], ratios, xerr=spread, color=colours, error_kw={"lw": 1})
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=6, fontsize=8)
        axes.axvline(1, color="black", lw=1, ls="--")
        axes.margins(x=0.12)
        axes.set_title(f"{name}: time of an image over our fastest engine's (blue: ours)", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _checked(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row with its PSNR; without its times if it drew something else."""
    ours, wanted = (folder / f"{slug(name)}.npy" for name in (row["name"], REFERENCE))
    if "reason" in row or not wanted.is_file():
        return row
    decibels = _psnr(ours, wanted)
    if decibels < LEAST_PSNR:
        kept = {name: row[name] for name in ("name", "ours")}
        return {**kept, "psnr": decibels, "reason": f"it draws other pictures than {REFERENCE}"}
    return {**row, "psnr": decibels}


def _psnr(path: Path, other: Path) -> float:
    import numpy as np

    return min(EQUAL_PSNR, psnr(*(np.load(file, allow_pickle=False) for file in (path, other))))


def _ratio(row: Mapping[str, Any], other: Mapping[str, Any], batch: int) -> float:
    ratio: float = median(row["seconds"][str(batch)]) / median(other["seconds"][str(batch)])
    return round(ratio, 4)


def _ratios(row: Mapping[str, Any], other: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Ratio of the medians, and the quartiles of the rounds' ratios."""
    pairs = zip(row["seconds"][str(batch)], other["seconds"][str(batch)], strict=True)
    single = [mine / theirs for mine, theirs in pairs]
    low, _, high = quantiles(single, n=4, method="inclusive") if len(single) > 1 else single * 3
    ratio = _ratio(row, other, batch)
    return {
        f"ratio_batch_{batch}": ratio,
        f"ratio_quartiles_batch_{batch}": [round(low, 4), round(high, 4)],
        f"ratio_text_batch_{batch}": f"{ratio:.2f} ({low:.2f} to {high:.2f})",
    }
