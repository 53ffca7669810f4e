"""The training progress bar: share of the budget, time left, the last losses."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 30
"""Between lines where there is no terminal to draw a bar in."""

Report = Callable[[int, dict[str, float]], None]


@contextmanager
def training_progress(fraction: Callable[[], float], shown: bool = True) -> Iterator[Report]:
    """Show a bar that follows `fraction()`, in [0, 1]; the yielded function gives it the step and logged scalars."""
    share, losses = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}")
    columns = (BarColumn(), share, TimeElapsedColumn(), TimeRemainingColumn(), losses)
    with Progress(*columns, refresh_per_second=1, disable=not shown) as progress:
        began, at_start = time.monotonic(), fraction()
        task = progress.add_task("starting", total=1.0)
        progress.update(task, completed=at_start)
        printed = began

        def report(step: int, scalars: dict[str, float]) -> None:
            losses = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items() if name.endswith("/loss"))
            progress.update(task, completed=fraction(), description=f"step {step}  {losses}")
            nonlocal printed
            if shown and not progress.console.is_terminal and time.monotonic() > printed + LOG_SECONDS:
                printed = time.monotonic()
                left = remaining(at_start, fraction(), printed - began)
                progress.console.print(f"{100 * fraction():.0f}%  {left} left  step {step}  {losses}")

        yield report


def remaining(at_start: float, now: float, seconds: float) -> timedelta:
    """Time left, to the second, when it took `seconds` from the share `at_start` to the share `now`."""
    speed = max(now - at_start, 1e-9) / max(seconds, 1e-9)
    return timedelta(seconds=round((1 - now) / speed))
