"""`auto`: whichever engine is the fastest here, and with how many threads, measured once and remembered."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..errors import FewstepError
from ..files import read_json, write_json
from . import ENGINES, TORCH, Engines, Found, engine_module, find_exports
from .device import this_device
from .others import Others
from .threads import thread_counts, try_threads

MEMORY = "auto.json"
KEPT = 32
"""Measurements that the file holds: machines, thread counts and sets of engines differ."""
ROUNDS, LONGEST = 7, 10.0
"""Calls of each candidate after its first, and the seconds after which no further round begins."""


@dataclass(frozen=True)
class Choice:
    """What `auto` takes.

    Args:
        chosen: an engine in torch, or the name of an export's folder.
        threads: how many of the CPU it is given.
        milliseconds: median of one image from noise and text states to pixels, of every candidate.
        by_threads: the same of the chosen one by its number of threads; empty where that was not to be chosen.
        passed_over: why others were no candidates, by name.
    """

    chosen: str
    threads: int
    milliseconds: Mapping[str, float]
    by_threads: Mapping[str, float]
    passed_over: Mapping[str, str]

    def __str__(self) -> str:
        ranked = sorted(self.milliseconds.items(), key=lambda item: item[1])
        listed = ", ".join(f"{name} {time:.1f} ms" for name, time in ranked)
        tried = ", ".join(f"{_threads(count)} {time:.1f} ms" for count, time in self.by_threads.items())
        refused = "".join(f"; passed over: {reason}" for reason in self.passed_over.values())
        found = f"the fastest of those measured here, an image each in turns: {listed}"
        return f"{found}{f'; then with {tried}' if tried else ''}{refused}"


def open_fastest(
    directory: Path,
    keys: Mapping[int | None, str],
    device: torch.device,
    in_torch: Mapping[str, Callable[[], Engines]],
    open_found: Callable[[Found], Engines],
    call: Callable[[Engines], Callable[[], object]],
) -> Engines:
    """Open the fastest of torch and all exports of a student that fit; on a CPU, with the fastest number of threads.

    The first time on a machine, all are opened with as many threads as there are processors and take turns; then the
    fastest does so with fewer (see `threads.thread_counts`), which the process is left with. The outcome is kept in
    `DIR/engines/auto.json` and holds for this device, these libraries, thread counts, weights and exports. Where that
    folder is read-only, every start measures; a choice made while others used the processors holds for this process.

    Args:
        directory: the student's.
        keys: as for `open_fitting`.
        device: where torch would run.
        in_torch: open the model directory in torch, by name.
        open_found: opens an export.
        call: makes of engines a call that draws one image.
    """
    exports = _exports(directory, keys)
    opening = {name: partial(open_found, found) for name, found in exports.items()}
    openers: dict[str, Callable[[], Engines]] = {**in_torch, **opening}
    counts = (torch.get_num_threads(),) if device.type == "cuda" else thread_counts()
    if len(openers) == len(counts) == 1:
        return replace(in_torch[TORCH](), reason="nothing that was exported fits here")
    circumstances = _circumstances(keys, device, sorted(openers), exports, counts)
    choice = _recall(directory, circumstances)
    if choice and choice.chosen in openers and choice.threads in counts:
        try_threads(choice.threads)
        try:
            return replace(openers[choice.chosen](), reason=str(choice))
        except FewstepError:  # damaged since: to be measured without it
            pass
    others = Others()
    choice, engines = _measure(openers, counts, call)
    if others.disturb():
        return replace(engines, reason=f"{choice}; for now, since others kept the processors busy meanwhile")
    _remember(directory, circumstances, choice)
    return replace(engines, reason=str(choice))


def take_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call, measured in turns: what else runs then slows all alike."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + LONGEST
    for round_number in range(ROUNDS):
        if round_number and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1000 * median(values), 3) for name, values in seconds.items()}


def _measure(
    openers: Mapping[str, Callable[[], Engines]],
    counts: Sequence[int],
    call: Callable[[Engines], Callable[[], object]],
) -> tuple[Choice, Engines]:
    """All engines with the first number of threads, then the fastest of them with every number."""
    try_threads(counts[0])
    opened, passed_over = _open_all(openers, call)
    times = take_turns({name: call(engines) for name, engines in opened.items()})
    chosen = min(times, key=times.__getitem__)
    by_count = {counts[0]: opened[chosen]}
    del opened  # the others' memory
    if len(counts) == 1:
        return Choice(chosen, counts[0], times, {}, passed_over), by_count[counts[0]]
    for count in counts[1:]:
        try_threads(count)
        by_count[count] = openers[chosen]()
    by_threads = take_turns({str(count): _with(count, call(engines)) for count, engines in by_count.items()})
    threads = min(by_count, key=lambda count: by_threads[str(count)])
    try_threads(threads)
    return Choice(chosen, threads, times, by_threads, passed_over), by_count[threads]


def _with(count: int, call: Callable[[], object]) -> Callable[[], object]:
    def call_with_threads() -> None:
        try_threads(count)
        call()

    return call_with_threads


def _threads(count: str) -> str:
    return f"{count} {'thread' if count == '1' else 'threads'}"


def _exports(directory: Path, keys: Mapping[int | None, str]) -> dict[str, Found]:
    """Those that fit, by the names of their folders."""
    found = [find_exports(directory, target, *key)[0] for target in ENGINES for key in keys.items()]
    usable = list(chain(*found))
    return {folder.name: (folder, manifest) for folder, manifest in usable}


def _open_all(
    openers: Mapping[str, Callable[[], Engines]], call: Callable[[Engines], Callable[[], object]]
) -> tuple[dict[str, Engines], dict[str, str]]:
    """Those that open and draw: what is compiled fails only then."""
    opened, passed_over = {}, {}
    for name, open_one in openers.items():
        try:
            engines = open_one()
            call(engines)()
            opened[name] = engines
        except FewstepError as error:
            passed_over[name] = str(error)
    return opened, passed_over


def _circumstances(
    keys: Mapping[int | None, str],
    device: torch.device,
    candidates: Sequence[str],
    exports: Mapping[str, Found],
    counts: Sequence[int],
) -> dict[str, Any]:
    """What a measurement holds for."""
    targets = sorted({manifest.target for _, manifest in exports.values()})
    return {
        "weights": list(keys.values()),
        "device": {**asdict(this_device()), "torch": str(device)},
        "libraries": [f"torch {torch.__version__}", *(engine_module(target).library() for target in targets)],
        "threads": list(counts),
        "candidates": list(candidates),
    }


def _recall(directory: Path, circumstances: Mapping[str, Any]) -> Choice | None:
    for entry in _entries(directory):
        if entry["circumstances"] == circumstances:
            return Choice(**entry["choice"])
    return None


def _remember(directory: Path, circumstances: Mapping[str, Any], choice: Choice) -> None:
    others = [entry for entry in _entries(directory) if entry["circumstances"] != circumstances]
    entries = [*others, {"circumstances": circumstances, "choice": asdict(choice)}][-KEPT:]
    try:
        write_json(directory / "engines" / MEMORY, entries)
    except FewstepError:
        return  # a read-only model is no less usable


def _entries(directory: Path) -> list[dict[str, Any]]:
    """What the file holds; nothing if it is absent or not what `_remember` writes."""
    try:
        entries: list[dict[str, Any]] = read_json(directory / "engines" / MEMORY)
        for entry in entries:
            entry["circumstances"], Choice(**entry["choice"]).milliseconds.items()
    except (FewstepError, AttributeError, KeyError, TypeError):
        return []
    return entries
