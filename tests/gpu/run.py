"""`make gpu`: every check that needs a CUDA device; results go to `results/gpu/<device>/`, one JSON file a section.

Each section runs in a process of its own, so that one that fails, or breaks the device's context, leaves the others.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[2]
# Libraries here may be of other versions than the project's, and have other warnings.
PYTEST = ["-m", "pytest", "-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider"]
MEASUREMENTS = {"kernels": ["-m", "fewstep.kernels.benchmark"], "speed": [str(ROOT / "tests" / "gpu" / "speed.py")]}
SECONDS = 400
"""At most this long for each section."""


def main(out: Path) -> int:
    """Run all sections; the exit status says whether all went well."""
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked, nothing was written")
        return 0
    folder = out / slug(torch.cuda.get_device_name())
    results = {"tests": run_tests([*PYTEST, "--continue-on-collection-errors", str(ROOT / "tests")])}
    results |= {section: run_measurement(arguments) for section, arguments in MEASUREMENTS.items()}
    for section, result in results.items():
        if result is not None:
            write(folder / f"{section}.json", {"machine": machine(), section: result})
    failed = [section for section, result in results.items() if result is None or failures(result)]
    print(f"failed: {', '.join(failed)}" if failed else f"all went well: see {folder}")
    return len(failed)


def run_tests(arguments: list[str]) -> dict[str, Any] | None:
    """Outcomes of the tests that pytest runs with these arguments, or None if it could not run them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        if python([*arguments, "--rootdir", str(ROOT), f"--junitxml={report}"]) is None or not report.exists():
            return None
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}
    return {"counts": dict(Counter(outcomes.values())), "outcomes": outcomes}


def outcome(case: ElementTree.Element) -> str:
    """`passed`, `skipped`, `failure` or `error`."""
    return next((child.tag for child in case if child.tag in ("skipped", "failure", "error")), "passed")


def failures(result: Any) -> int:
    """How many tests failed; measurements cannot."""
    counts = result.get("counts", {}) if isinstance(result, dict) else {}
    return counts.get("failure", 0) + counts.get("error", 0)


def run_measurement(arguments: list[str]) -> Any:
    """What a program prints as JSON in its last line, or None if it failed."""
    done = python(arguments, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1]) if done and done.returncode == 0 else None


def python(arguments: list[str], stdout: int | None = None) -> "subprocess.CompletedProcess[str] | None":
    """This interpreter with other arguments; None if it took too long."""
    print(f"python {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-P", *arguments]
    try:
        return subprocess.run(command, stdout=stdout, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"stopped after {SECONDS} s")
        return None


def machine() -> dict[str, Any]:
    """What the results were found on and with."""
    properties = torch.cuda.get_device_properties()
    packages = {name: installed(name) for name in ("torch", "triton", "diffusers", "accelerate")}
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
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


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(ROOT / "results" / "gpu"))
