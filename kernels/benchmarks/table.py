"""`python -m fewstep.kernels.benchmarks.table README RESULTS`: writes the measured numbers into the kernels' page.

A table stands between two HTML comments of its name, and says so where nothing has been measured.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NOT_MEASURED = "Nothing has been timed on a GPU yet: `make gpu` on a machine with one fills this table."
NOT_COMPILED = "Nothing has been recorded yet: `make resources` fills this table."


def speed_table(devices: Mapping[str, Sequence[Row]]) -> str:
    """Each kernel and shape, with the fraction of its ceiling and how much faster it is than `torch.compile`.

    Args:
        devices: the rows of `benchmarks.measure.compare`, by the name of the GPU.
    """
    found = {device: {(_title(row), row["pass"]): row for row in rows} for device, rows in devices.items()}
    titles = dict.fromkeys(title for rows in found.values() for title, _ in rows)
    if not titles:
        return NOT_MEASURED
    header = ["kernel", "shape", *(f"{device}, {way}" for device in found for way in ("forward", "backward"))]
    lines = [
        [*title, *(_speed(rows.get((title, way))) for rows in found.values() for way in ("forward", "backward"))]
        for title in titles
    ]
    return _table(header, lines)


def _title(row: Row) -> tuple[str, str]:
    return row["operation"], f"{row['model']}, {row['where']}"


def _speed(row: Row | None) -> str:
    """`81 %, 1.9x`: of the ceiling, and beside `torch.compile`."""
    if row is None:
        return ""
    times, fraction = row["microseconds"], f"{100 * row['fraction_of_ceiling']:.0f} %"
    return f"{fraction}, {times['compiled'] / times['kernel']:.1f}x" if "compiled" in times else fraction


def resource_table(modules: Mapping[str, Row]) -> str:
    """Each kernel with the most that it takes of any GPU, whatever the dtype.

    Args:
        modules: entries of `resources.measure`.
    """
    rows = [{**row, "module": module} for module, entry in modules.items() for row in entry["rows"]]
    if not rows:
        return NOT_COMPILED
    kernels = dict.fromkeys((row["module"], row["kernel"]) for row in rows)
    figures = ("registers", "spilled_bytes", "shared_bytes")
    lines = []
    for module, kernel in kernels:
        mine = [row for row in rows if (row["module"], row["kernel"]) == (module, kernel)]
        lines.append([f"`{module}`", kernel, *(str(max(row[figure] for row in mine)) for figure in figures)])
    return _table(["file", "kernel", "registers", "spilled bytes", "shared bytes"], lines)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def filled(page: str, name: str, content: str) -> str:
    """The page with the content between the comments `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the page has no such comments.
    """
    mark = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
    if not mark.search(page):
        raise ValueError(f"the page has no comments <!-- {name} --> and <!-- /{name} --> to write between")
    return mark.sub(lambda found: f"{found[1]}\n{content}\n\n<!-- /{name} -->", page)


def rendered(page: str, results: Path) -> str:
    """The page with all tables, from `gpu/*/kernels.json` and `kernels/resources.json` under `results`."""
    devices = {file.parent.name: _read(file)["rows"] for file in sorted(results.glob("gpu/*/kernels.json"))}
    recorded = results / "kernels" / "resources.json"
    modules = _read(recorded)["modules"] if recorded.exists() else {}
    return filled(filled(page, "speed", speed_table(devices)), "resources", resource_table(modules))


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def main(page: Path, results: Path) -> None:
    """Rewrite the page."""
    page.write_text(rendered(page.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
