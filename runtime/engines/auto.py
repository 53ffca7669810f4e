"""`auto`: whichever engine is the fastest here, measured once and remembered beside the engines."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..errors import FewstepError
from ..files import read_json, write_json
from . import ENGINES, Engines, Found, engine_module, find_exports
from .device import this_device

MEMORY = "auto.json"
KEPT = 32
"""Measurements that the file holds: machines, thread counts and sets of engines differ."""
ROUNDS, LONGEST = 7, 10.0
"""Calls of each candidate after its first, and the seconds after which no further round begins."""


@dataclass(frozen=True)
class Choice:
    """What `auto` takes.

    Args:
        chosen: `torch`, or the name of an export's folder.
        milliseconds: median of one image from noise and text states to pixels, of every candidate.
        passed_over: why others were no candidates, by name.
    """

    chosen: str
    milliseconds: Mapping[str, float]
    passed_over: Mapping[str, str]

    def __str__(self) -> str:
        ranked = sorted(self.milliseconds.items(), key=lambda item: item[1])
        listed = ", ".join(f"{name} {time:.1f} ms" for name, time in ranked)
        refused = "".join(f"; passed over: {reason}" for reason in self.passed_over.values())
        return f"the fastest of those measured here, an image each in turns: {listed}{refused}"


def open_fastest(
    directory: Path,
    keys: Mapping[int | None, str],
    device: torch.device,
    open_torch: Callable[[], Engines],
    open_found: Callable[[Found], Engines],
    call: Callable[[Engines], Callable[[], object]],
) -> Engines:
    """Open the fastest of torch and all exports of a student that fit.

    The first time on a machine, all are opened and take turns; the outcome is kept in `DIR/engines/auto.json` and holds
    for this device, these libraries, thread count, weights and exports. Where that folder is read-only, every start
    measures.

    Args:
        directory: the student's.
        keys: as for `open_fitting`.
        device: where torch would run.
        open_torch: opens the model directory in torch.
        open_found: opens an export.
        call: makes of engines a call that draws one image.
    """
    exports = _exports(directory, keys)
    if not exports:
        return replace(open_torch(), reason="nothing that was exported fits here")
    openers = {"torch": open_torch} | {name: partial(open_found, found) for name, found in exports.items()}
    circumstances = _circumstances(keys, device, exports)
    choice = _recall(directory, circumstances)
    if choice and choice.chosen in openers:
        try:
            return replace(openers[choice.chosen](), reason=str(choice))
        except FewstepError:  # damaged since: to be measured without it
            pass
    opened, passed_over = _open_all(openers)
    times = take_turns({name: call(engines) for name, engines in opened.items()})
    choice = Choice(min(times, key=times.__getitem__), times, passed_over)
    _remember(directory, circumstances, choice)
    return replace(opened[choice.chosen], reason=str(choice))


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


def _exports(directory: Path, keys: Mapping[int | None, str]) -> dict[str, Found]:
    """Those that fit, by the names of their folders."""
    found = [find_exports(directory, target, *key)[0] for target in ENGINES for key in keys.items()]
    usable = list(chain(*found))
    return {folder.name: (folder, manifest) for folder, manifest in usable}


def _open_all(openers: Mapping[str, Callable[[], Engines]]) -> tuple[dict[str, Engines], dict[str, str]]:
    opened, passed_over = {}, {}
    for name, open_one in openers.items():
        try:
            opened[name] = open_one()
        except FewstepError as error:
            passed_over[name] = str(error)
    return opened, passed_over


def _circumstances(
    keys: Mapping[int | None, str], device: torch.device, exports: Mapping[str, Found]
) -> dict[str, Any]:
    """What a measurement holds for."""
    targets = sorted({manifest.target for _, manifest in exports.values()})
    return {
        "weights": list(keys.values()),
        "device": {**asdict(this_device()), "torch": str(device)},
        "libraries": [f"torch {torch.__version__}", *(engine_module(target).library() for target in targets)],
        "threads": torch.get_num_threads(),
        "exports": sorted(exports),
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
