"""Tables of results, for the terminal and in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import FewstepError
from ..runtime.files import atomic_path

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: its title, the value of a row that it shows, and how; a value that is None or missing stays blank."""

    title: str
    name: str
    pattern: str = "{}"

    def cell(self, row: Row) -> str:
        """The row's value as text."""
        value = row.get(self.name)
        return "" if value is None else self.pattern.format(value)


SCORES = (
    Column("FD-EffLite0", "fd", "{:.1f}"),
    Column("KID", "kid", "{:.4f}"),
    Column("precision", "precision", "{:.2f}"),
    Column("recall", "recall", "{:.2f}"),
    Column("coverage", "coverage", "{:.2f}"),
    Column("match@1", "match_at_1", "{:.1%}"),
    Column("diversity", "diversity", "{:.3f}"),
)
"""The scores that every table of evaluations shows."""


def print_table(columns: Sequence[Column], rows: Sequence[Row], title: str | None = None) -> None:
    """Print a table without its blank columns; a terminal that is too narrow breaks its lines, but nothing is cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = _filled(columns, rows)
    table = Table(*(column.title for column in shown), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for row in rows:
        table.add_row(*(column.cell(row) for column in shown))
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(console.width, needed)).print(table)


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table in Markdown without its blank columns."""
    shown = _filled(columns, rows)
    lines = [[column.title for column in shown], ["---"] * len(shown)]
    lines += [[column.cell(row).replace("|", "\\|") for column in shown] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the comments `<!-- NAME -->` and `<!-- /NAME -->` of a Markdown page.

    Raises:
        FewstepError: the page has no such comments.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise FewstepError(f"{page} has no section from {begin} to {end}: add both where it is to go")
    with atomic_path(page) as temporary:
        temporary.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def _filled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    return [column for column in columns if any(column.cell(row) for row in rows)]
