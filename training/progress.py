"""The training progress bar: share of the budget, time left, the last losses."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 30
"""Between lines where there is no terminal to draw a bar in."""

Report = Callable[[int, dict[str, float]], None]


@contextmanager
def training_progress(fraction: Callable[[], float]) -> Iterator[Report]:
    """Show a bar that follows `fraction()`, in [0, 1]; the yielded function gives it the step and logged scalars."""
    share, losses = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}")
    columns = (BarColumn(), share, TimeElapsedColumn(), TimeRemainingColumn(), losses)
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task("starting", total=1.0)
        printed = time.monotonic()

        def report(step: int, scalars: dict[str, float]) -> None:
            losses = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items() if name.endswith("/loss"))
            progress.update(task, completed=fraction(), description=f"step {step}  {losses}")
            nonlocal printed
            if not progress.console.is_terminal and time.monotonic() > printed + LOG_SECONDS:
                printed = time.monotonic()
                progress.console.print(f"{100 * fraction():.0f}%  step {step}  {losses}")

        yield report
