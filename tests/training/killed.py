"""A training killed again and again, run by a test: `python killed.py FOLDER`.

Children are forked, so that the libraries are imported once. Every other child is killed while it writes its
checkpoint, the others at any moment.
"""

import os
import random
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import accelerate  # noqa: F401  (once for all children)
import matplotlib.figure  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from launched import main

ITERATIONS = 60
KILLS = 6


def train(folder: Path) -> int:
    """Train in a child of its own; its process number."""
    child = os.fork()
    if child:
        return child
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        main(folder, iterations=ITERATIONS, checkpoint_minutes=0, accumulation=2)
    os._exit(0)


def kill(child: int, folder: Path, attempt: int) -> bool:
    """Kill a child at a moment that differs between attempts; whether it was still training."""
    state = folder / "state.pt"
    before = modified(state)
    while modified(state) == before and not is_over(child):  # it has yet to go on
        time.sleep(0.001)
    if attempt % 2:
        while not list(folder.glob(".state.pt.*.part")) and not is_over(child):
            pass
    else:
        time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def modified(file: Path) -> int:
    """When a file was last written; 0 if there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def is_over(child: int) -> bool:
    """Whether a child has ended by itself."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    random.seed(0)
    whole, parts = Path(sys.argv[1]) / "whole", Path(sys.argv[1]) / "parts"
    os.waitpid(train(whole), 0)
    killed = sum(kill(train(parts), parts, attempt) for attempt in range(KILLS))
    _, status = os.waitpid(train(parts), 0)
    print(killed)
    sys.exit(os.waitstatus_to_exitcode(status))
