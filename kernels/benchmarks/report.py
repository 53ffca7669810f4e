"""Measurements within a time, kept in a file after each: nothing is lost when the process is stopped."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Measurement = tuple[str, Callable[[], Iterable[Row]]]
"""A name, and what makes its rows."""


class Report:
    """Rows of measurements, the most important first.

    Args:
        file: receives the JSON; None keeps the rows in memory.
        seconds: no measurement begins later than this.
        facts: that hold for all rows.
    """

    def __init__(self, file: Path | None, seconds: float, facts: Row | None = None) -> None:
        self.file, self.end = file, time.monotonic() + seconds
        self.content: dict[str, Any] = {**(facts or {}), "rows": [], "left_out": [], "failed": {}}

    def measure(self, measurements: Iterable[Measurement]) -> None:
        """Add the rows of each measurement; one that fails, or for which there is no time, is named instead."""
        for name, rows in measurements:
            if time.monotonic() > self.end:
                self.content["left_out"].append(name)
                continue
            try:
                for row in rows():
                    self.content["rows"].append(row)
                    self._write()
            except Exception as error:  # whatever it is, the others are worth having
                self.content["failed"][name] = f"{type(error).__name__}: {error}"[:500]
                print(f"failed: {name}: {error}", file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            write_json(self.file, self.content)


def write_json(file: Path, content: Any) -> None:
    """Write indented JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)
