"""How many threads a CPU's work is given: the user's number where there is one, else the fastest of a few.

Torch's number holds for the process, and every session takes it when it is opened. Who sets `OMP_NUM_THREADS` or
`MKL_NUM_THREADS`, gives `fewstep serve --threads`, or has called `torch.set_num_threads` with another number than
torch's own choice, is not overruled.
"""

import os

import torch

from .device import physical_cores, usable_processors

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_by_user, _by_auto = set[int](), set[int]()
"""Numbers that were set through this file."""


def thread_counts() -> tuple[int, ...]:
    """Numbers worth measuring, the largest first: a thread a processor, a thread a core, and one; or the user's."""
    if _is_settled():
        return (torch.get_num_threads(),)
    _, granted = usable_processors()
    return tuple(sorted({granted, min(granted, physical_cores()), 1}, reverse=True))


def set_threads(count: int) -> None:
    """Give this process the number of threads that its user wants."""
    _by_user.add(count)
    torch.set_num_threads(count)


def try_threads(count: int) -> None:
    """Give this process a number of threads that `thread_counts` offers."""
    if count != torch.get_num_threads():
        _by_auto.add(count)
        torch.set_num_threads(count)


def _is_settled() -> bool:
    count, (processors, _) = torch.get_num_threads(), usable_processors()
    own = {processors, min(processors, physical_cores()), *_by_auto}
    return count in _by_user or count not in own or any(os.environ.get(name) for name in VARIABLES)
