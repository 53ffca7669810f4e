"""`make gpu`: every check that needs a CUDA device, within eight minutes; results go to `results/gpu/<device>/`.

Each section runs in processes of its own, so that one that fails, or breaks the device's context, leaves the others;
measurements write their file after every row, the most important rows first, and name what they left out. While the
tests run, whose speed does not matter, other processes fill the cache of `torch.compile` for the sections that follow
and have the device to themselves.
"""

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from fewstep.kernels.benchmarks.report import write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS, END_TO_END = ["-m", "fewstep.kernels.benchmarks"], [str(HERE / "end_to_end.py")]
# Libraries here may be of other versions than the project's, and have other warnings.
PYTEST = ["-m", "pytest", "-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider"]
COMPILED = ("compiled", "kernels, compiled, graph")
"""Variants of `end_to_end.py` that between them compile everything."""
PREPARATIONS = [
    *([*KERNELS, "--prepare", str(share), "3"] for share in range(3)),
    *([*END_TO_END, "--prepare", *what] for what in product(("SD1.5", "Sana", "built-in", "SDXL"), COMPILED)),
]
MEASUREMENTS = {"kernels": KERNELS, "end_to_end": END_TO_END, "training": [str(HERE / "training_steps.py")]}
UNTIL = {"tests": 120, "kernels": 220, "end_to_end": 385, "training": 440}
"""Seconds after the start at which each section begins nothing more; what one leaves over goes to the next."""
GRACE = 15
"""Seconds after which a section that is still at its last row is stopped: its file stands."""


def main(out: Path) -> int:
    """Run all sections; the exit status is how many went wrong."""
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked, nothing was written")
        return 0
    start = time.monotonic()
    folder = out / slug(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "machine.json", machine())

    def left(section: str) -> float:
        return UNTIL[section] - (time.monotonic() - start)

    background = [begin(arguments, quiet=True) for arguments in PREPARATIONS]
    tests = run_tests([*PYTEST, *in_parallel(), str(ROOT / "tests")], left("tests"))
    for process in background:
        finish(process, max(0.0, left("tests")))
    if tests is not None:
        write_json(folder / "tests.json", tests)
    failed = ["tests"] if tests is None or failures(tests) else []
    for section, arguments in MEASUREMENTS.items():
        seconds, file = left(section), folder / f"{section}.json"
        file.unlink(missing_ok=True)
        process = begin([*arguments, "--out", str(file), "--seconds", f"{seconds:.0f}"])
        finish(process, seconds + GRACE)
        if not file.exists():
            failed.append(section)
    finish(begin([str(HERE / "picture.py"), str(folder)]), GRACE)
    print(f"failed: {', '.join(failed)}" if failed else f"all went well: see {folder}")
    return len(failed)


def in_parallel() -> list[str]:
    """Compiling a kernel takes a processor much longer than running it takes a GPU."""
    return ["-n", "6"] if find_spec("xdist") else []


def run_tests(arguments: Sequence[str], seconds: float) -> dict[str, Any] | None:
    """Outcomes and notes of the tests that pytest runs with these arguments in the time, or None if it ended badly."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["--continue-on-collection-errors", f"--session-timeout={seconds:.0f}", f"--junitxml={report}"]
        status = finish(begin([*arguments, *options, "--rootdir", str(ROOT)]), seconds + GRACE)
        if status is None or not report.exists():
            return None
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}
    noted = {f"{case.get('classname')}::{case.get('name')}": properties(case) for case in cases}
    found = {name: values for name, values in noted.items() if values}
    return {"counts": dict(Counter(outcomes.values())), "outcomes": outcomes, "noted": found}


def outcome(case: ElementTree.Element) -> str:
    """`passed`, `skipped`, `failure` or `error`."""
    return next((child.tag for child in case if child.tag in ("skipped", "failure", "error")), "passed")


def properties(case: ElementTree.Element) -> dict[str, str]:
    """What a test noted with pytest's `record_property`: times, say."""
    return {each.get("name", ""): each.get("value", "") for each in case.iter("property")}


def failures(tests: dict[str, Any]) -> int:
    """How many tests failed."""
    counts: dict[str, int] = tests["counts"]
    return counts.get("failure", 0) + counts.get("error", 0)


def begin(arguments: Sequence[str], quiet: bool = False) -> "subprocess.Popen[bytes]":
    """This interpreter with other arguments; the scripts here find each other."""
    if not quiet:
        print(f"python {' '.join(arguments)}", flush=True)
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    output = subprocess.DEVNULL if quiet else None
    command = [sys.executable, "-P", *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def finish(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Its exit status; None if it took longer, and was stopped with all that it had started."""
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        print(f"stopped after {max(0.0, seconds):.0f} s: {process.args}", flush=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def machine() -> dict[str, Any]:
    """What the results were found on and with."""
    properties = torch.cuda.get_device_properties()
    packages = {name: installed(name) for name in ("torch", "triton", "diffusers", "accelerate", "liger-kernel")}
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **packages,
    }


def installed(package: str) -> str | None:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main(ROOT / "results" / "gpu"))
