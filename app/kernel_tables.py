"""`python -m fewstep.app.kernel_tables README RESULTS`: writes the measured numbers into the kernels' page.

A table says so where nothing has been measured.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.files import read_json
from .tables import Column, Row, markdown_table, replace_section

NOT_MEASURED = "Nothing has been timed on a GPU yet: `make gpu` on a machine with one fills this table."
NOT_COMPILED = "Nothing has been recorded yet: `make resources` fills this table."
FIGURES = ("registers", "spilled_bytes", "shared_bytes")


def speed_table(devices: Mapping[str, Sequence[Row]]) -> str:
    """Each kernel and shape, with the fraction of its ceiling and how much faster it is than `torch.compile`.

    Args:
        devices: the rows of `benchmarks.measure.compare`, by the name of the GPU.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for device, rows in devices.items():
        for row in rows:
            kernel, shape = row["operation"], f"{row['model']}, {row['where']}"
            cells.setdefault((kernel, shape), {"kernel": kernel, "shape": shape})[f"{device}, {row['pass']}"] = _speed(
                row
            )
    titles = [f"{device}, {way}" for device in devices for way in ("forward", "backward")]
    columns = [Column(title, title) for title in ("kernel", "shape", *titles)]
    return markdown_table(columns, list(cells.values())) if cells else NOT_MEASURED


def _speed(row: Row) -> str:
    """`81 %, 1.9x`: of the ceiling, and beside `torch.compile`."""
    times, fraction = row["microseconds"], f"{100 * row['fraction_of_ceiling']:.0f} %"
    return f"{fraction}, {times['compiled'] / times['kernel']:.1f}x" if "compiled" in times else fraction


def resource_table(modules: Mapping[str, Row]) -> str:
    """Each kernel with the most that it takes of any GPU, whatever the dtype.

    Args:
        modules: entries of `resources.measure`.
    """
    most: dict[tuple[str, str], dict[str, Any]] = {}
    for module, entry in modules.items():
        for row in entry["rows"]:
            found = most.setdefault((module, row["kernel"]), {"file": f"`{module}`", "kernel": row["kernel"]})
            for figure in FIGURES:
                found[figure] = max(found.get(figure, 0), row[figure])
    columns = [Column(name.replace("_", " "), name) for name in ("file", "kernel", *FIGURES)]
    return markdown_table(columns, list(most.values())) if most else NOT_COMPILED


def main(page: Path, results: Path) -> None:
    """Write both tables, from `gpu/*/kernels.json` and `kernels/resources.json` under `results`."""
    devices = {file.parent.name: read_json(file)["rows"] for file in sorted(results.glob("gpu/*/kernels.json"))}
    recorded = results / "kernels" / "resources.json"
    replace_section(page, "speed", speed_table(devices))
    replace_section(page, "resources", resource_table(read_json(recorded)["modules"] if recorded.exists() else {}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
