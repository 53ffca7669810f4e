"""`fewstep bench --engines`: a student on every engine there is, each in a process of its own, taking turns."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from ...runtime.artefact import read_card
from ...runtime.engines import ENGINES, find_exports
from ...runtime.engines.device import computes_bf16
from ...runtime.errors import FewstepError
from ..tables import Column
from .own_worker import HALF
from .worker import OURS, Worker, prompts, take_turns

BATCHES = (1, 8)
COLUMNS = (
    Column("engine", "engine"),
    Column("load, s", "load_seconds", "{:.1f}"),
    Column("first call, ms", "first_call_milliseconds", "{:.0f}"),
    *(Column(f"ms, batch {batch}", f"milliseconds_batch_{batch}", "{:.1f}") for batch in BATCHES),
    Column("peak, MiB", "peak_mebibytes", "{:.0f}"),
    Column("images/s", "images_per_second", "{:.1f}"),
)


def engine_table(student: Path, rounds: int, report: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Measure a student at its default step count on every engine; one row each, for `COLUMNS`.

    Loading begins with an interpreter that has imported nothing; the first call draws one image; peak memory is the
    whole process's, or on a GPU what torch held there. Every call has prompts of its own, so that text is encoded anew.

    Args:
        student: its directory.
        rounds: calls for each batch size, whose medians are given.
        report: called with (rounds done, rounds in all).

    Raises:
        FewstepError: the directory is not a student, or an engine fails.
    """
    with ExitStack() as stack:
        opened = []
        for name in available(student):  # one after another, each alone while it loads
            worker = stack.enter_context(open_engine(student, name))
            opened.append((worker, worker.draw(prompts(1, 0))))
            for batch in BATCHES[1:]:
                worker.draw(prompts(batch, 0))  # what a batch size takes once, such as compilation
        take_turns([worker for worker, _ in opened], BATCHES, rounds, report)
        return [_row(worker, first_call) for worker, first_call in opened]


def available(student: Path) -> Iterator[str]:
    """Torch, in bf16 too where the processor computes it, and every export that fits, by `Manifest.name`.

    Raises:
        FewstepError: the directory is not a student.
    """
    card = read_card(student)
    if card.kind != "student":
        raise FewstepError(f"{student} is a teacher: give the directory of its student")
    yield "torch"
    if computes_bf16():
        yield HALF
    for target, steps in product(ENGINES, (card.steps[0], None)):
        for _, manifest in find_exports(student, target, steps, card.engine_key(steps))[0]:
            yield manifest.name


def open_engine(student: Path, name: str) -> Worker:
    """A process that holds one engine.

    Raises:
        FewstepError: the engine does not open.
    """
    return Worker(name, OURS, {"export": False, "model": str(student), "engine": name})


def measured(worker: Worker, first_call_seconds: float) -> dict[str, Any]:
    """What every table of engines holds of a worker."""
    medians = {batch: worker.median(batch) for batch in worker.seconds}
    return {
        "load_seconds": round(worker.load_seconds, 2),
        "first_call_milliseconds": round(1000 * first_call_seconds, 1),
        **{f"milliseconds_batch_{batch}": round(1000 * seconds, 2) for batch, seconds in medians.items()},
        "peak_mebibytes": round(worker.peak_mebibytes(), 1),
    }


def _row(worker: Worker, first_call_seconds: float) -> dict[str, Any]:
    speed = max(batch / worker.median(batch) for batch in worker.seconds)
    return {"engine": worker.name, **measured(worker, first_call_seconds), "images_per_second": round(speed, 2)}
