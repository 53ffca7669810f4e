"""`fewstep bench --engines`: a student on every engine there is, each in a process of its own, taking turns."""

import multiprocessing
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..runtime.artefact import read_card
from ..runtime.engines import ENGINES, find_exports
from ..runtime.engines.device import instructions
from ..runtime.errors import FewstepError
from .tables import Column

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline

BATCHES = (1, 8)
MEBIBYTE = 2**20
HALF = "torch-bf16"
COMPUTES_HALF = {"avx512_bf16", "amx_bf16", "bf16"}
SUBJECTS = ("rocket", "star", "car", "tree", "cat", "heart", "clock", "house")
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
    workers = [Worker(student, name) for name in available(student)]  # one after another, each alone while it loads
    for batch in BATCHES[1:]:
        for worker in workers:
            worker.draw(batch)  # what a batch size takes once, such as compilation
    for done in range(rounds):
        for batch in BATCHES:
            for worker in workers:
                worker.seconds.setdefault(batch, []).append(worker.draw(batch))
        report(done + 1, rounds)
    return [worker.row() for worker in workers]


def available(student: Path) -> Iterator[str]:
    """Torch, in bf16 too where the processor computes it, and every export that fits, such as `onnx-fp32`.

    Raises:
        FewstepError: the directory is not a student.
    """
    card = read_card(student)
    if card.kind != "student":
        raise FewstepError(f"{student} is a teacher: give the directory of its student")
    yield "torch"
    if COMPUTES_HALF.intersection(instructions()):
        yield HALF
    steps = card.steps[0]
    for target in ENGINES:
        for _, manifest in find_exports(student, target, steps, card.engine_key(steps))[0]:
            yield f"{target}-{manifest.precision}"


class Worker:
    """A process that holds one engine.

    Raises:
        FewstepError: the engine does not open.
    """

    def __init__(self, student: Path, name: str) -> None:
        self.name, self.seconds = name, dict[int, list[float]]()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        start = time.perf_counter()
        context.Process(target=_serve, args=(theirs, student, name), daemon=True).start()
        theirs.close()
        self._answer()
        self.load_seconds = time.perf_counter() - start
        self.first_call_seconds = self.draw(1)

    def draw(self, batch: int) -> float:
        """Seconds that so many images take, prompts to pixels."""
        self.connection.send(batch)
        seconds: float = self._answer()
        return seconds

    def row(self) -> dict[str, Any]:
        """What was measured; ends the process."""
        self.connection.send(0)
        peak = self._answer()
        medians = {batch: median(seconds) for batch, seconds in self.seconds.items()}
        return {
            "engine": self.name,
            "load_seconds": round(self.load_seconds, 2),
            "first_call_milliseconds": round(1000 * self.first_call_seconds, 1),
            **{f"milliseconds_batch_{batch}": round(1000 * seconds, 2) for batch, seconds in medians.items()},
            "peak_mebibytes": round(peak, 1),
            "images_per_second": round(max(batch / seconds for batch, seconds in medians.items()), 2),
        }

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError as error:
            raise FewstepError(f"the process of {self.name} ended: it may have run out of memory") from error
        if isinstance(answer, FewstepError):
            raise answer
        return answer


def _serve(connection: Connection, student: Path, name: str) -> None:
    """Answer each batch size with seconds, and 0 with the peak memory."""
    import torch

    from ..runtime.pipeline import Pipeline

    try:
        pipeline = Pipeline.from_pretrained(student, "torch" if name == HALF else name)
    except FewstepError as error:
        connection.send(error)
        return
    if name == HALF:
        _halve(pipeline)
    connection.send(None)
    calls = 0
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=name == HALF):
        while batch := connection.recv():
            prompts, calls = _prompts(batch, calls), calls + 1
            start = time.perf_counter()
            pipeline.generate(prompts, seed=calls, batch_size=batch)
            connection.send(time.perf_counter() - start)
    connection.send(_peak_mebibytes())


def _prompts(batch: int, call: int) -> Sequence[str]:
    return [f"{SUBJECTS[position % len(SUBJECTS)]} {call}, fluent 3d style" for position in range(batch)]


def _halve(pipeline: "Pipeline") -> None:
    """Store in bf16 what autocast computes in it, which would else cast the weights in every call."""
    import torch
    from torch import nn

    for part in (pipeline.model.network, pipeline.model.decoder):
        for layer in part.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(torch.bfloat16)


def _peak_mebibytes() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MEBIBYTE
    status = Path("/proc/self/status")
    # The kernel's `ru_maxrss` begins at what the parent held when it started the process.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024
