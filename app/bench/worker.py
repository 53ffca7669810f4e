"""A process that draws with one contender, whoever's Python it runs on; and the clock, which lets them take turns."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from ...runtime.errors import FewstepError

SUBJECTS = ("rocket", "star", "car", "tree", "cat", "heart", "clock", "house")
OURS = (sys.executable, "-P", "-m", "fewstep.app.bench.own_worker")
"""The program of a worker of ours; a peer's is `peer_worker.py`."""


class Worker:
    """One contender, opened in a process of its own that has imported nothing before; a context that ends it.

    Args:
        name: of the contender.
        program: what to start, such as `OURS`.
        job: says what to open, or to export; see `peer_worker.serve`.
        environment: variables of the process, besides our own.
        log: file for what it prints; None leaves it where ours goes.

    Raises:
        FewstepError: the contender does not open; with the process's own words.
    """

    def __init__(
        self,
        name: str,
        program: Sequence[str | Path],
        job: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.name, self.seconds = name, dict[int, list[float]]()
        start = time.perf_counter()
        errors = log.open("w", encoding="utf-8") if log else None
        self._process = subprocess.Popen(
            [*program, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        if errors:
            errors.close()
        try:
            self.opened = self._answer()
        except FewstepError:
            self.stop()
            raise
        self.load_seconds = time.perf_counter() - start

    def draw(self, prompts: Sequence[str], save: Path | None = None) -> float:
        """Seconds from prompts to pixels (B, H, W, 3); `save` is an `.npy` file for them."""
        seconds: float = self._ask({"prompts": list(prompts), "save": save and str(save)})["seconds"]
        return seconds

    def time(self, prompts: Sequence[str]) -> None:
        """Draw, and keep the seconds with those of the same batch size."""
        self.seconds.setdefault(len(prompts), []).append(self.draw(prompts))

    def median(self, batch: int) -> float:
        """Median seconds of a batch."""
        return median(self.seconds[batch])

    def peak_mebibytes(self) -> float:
        """The most memory that the process has held."""
        peak: float = self._ask({})["peak_mebibytes"]
        return peak

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, float]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FewstepError(answer["error"])
        return answer

    def _ended(self) -> FewstepError:
        return FewstepError(f"the process of {self.name} ended: it may have run out of memory")


def prompts(batch: int, call: int) -> list[str]:
    """So many prompts, which no other call has."""
    return [f"{SUBJECTS[position % len(SUBJECTS)]} {call}, fluent 3d style" for position in range(batch)]


def take_turns(
    workers: Sequence[Worker],
    batches: Sequence[int],
    rounds: int,
    report: Callable[[int, int], None],
    make_prompts: Callable[[int, int], list[str]] = prompts,
) -> None:
    """Time every worker at every batch size, `rounds` times, one after another: what else runs then slows all alike.

    Args:
        workers: each has drawn at every batch size before.
        batches: images a call.
        rounds: measurements.
        report: called with (rounds done, rounds in all).
        make_prompts: gives those of a batch size in a call, which counts from 1.
    """
    for done in range(1, rounds + 1):
        for batch in batches:
            for worker in workers:
                worker.time(make_prompts(batch, done))
        report(done, rounds)
