"""`python -m fewstep.kernels.benchmarks --out FILE`: every kernel at every shape, on a machine with a GPU."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from .cases import all_cases
from .measure import Settings, compare
from .report import Measurement, Report
from .shapes import FULL, Shapes
from .timing import copy_bandwidth, matrix_rates


def measure_all(report: Report, settings: Settings, shapes: Shapes = FULL, side: int = 8192) -> None:
    """The device's ceilings, then all cases in formats that it multiplies; `side` is that of the ceilings' matrices."""
    ceilings = matrix_rates(settings.device, side)
    report.content["ceilings"] = {
        "copy_gigabytes_per_second": copy_bandwidth(settings.device, 16 * side**2),
        "matrix_teraflops": ceilings,
    }
    cases = (case for case in all_cases(shapes) if not case.work or case.ceiling in ceilings)
    report.measure((case.name, partial(compare, case, settings, ceilings)) for case in cases)


def compile_share(settings: Settings, share: int, of: int) -> None:
    """Leave what `torch.compile` makes of every `of`-th case in its cache on disk, where another process finds it."""
    placeholder = dict.fromkeys(("bf16", "int8", "fp8"), 1.0)

    def measurements() -> Iterator[Measurement]:
        for position, case in enumerate(all_cases()):
            if position % of == share:
                yield case.name, partial(compare, case, settings, placeholder)

    Report(None, float("inf")).measure(measurements())


def main(arguments: Sequence[str]) -> None:
    """Measure on the GPU into a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="receives the numbers")
    parser.add_argument("--seconds", type=float, default=300, help="no case begins later than this")
    parser.add_argument("--prepare", type=int, nargs=2, metavar=("SHARE", "OF"), help="only fill torch.compile's cache")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: there is nothing to measure")
    device = torch.device("cuda")
    if given.prepare:
        compile_share(Settings(device, repeats=1), *given.prepare)
    else:
        measure_all(Report(given.out, given.seconds), Settings(device))


if __name__ == "__main__":
    main(sys.argv[1:])
