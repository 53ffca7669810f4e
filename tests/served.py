"""Programs that serve, as people start them: in a process of their own."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Server:
    """A running `fewstep serve` or `fewstep demo`.

    Args:
        process: the server's.
        url: where it listens.
        log: file that its log goes to.
    """

    process: subprocess.Popen[str]
    url: str
    log: Path

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


def start(log: Path, *arguments: object) -> Server:
    """Start `fewstep` with these arguments, and wait until it says where it serves.

    Raises:
        RuntimeError: it ended before that.
    """
    command = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", *map(str, arguments)]
    with log.open("w") as errors:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    found = re.search(r"on (http://\S+)", process.stdout.readline())
    if not found:
        process.communicate(timeout=30)
        raise RuntimeError(log.read_text())
    return Server(process, found[1], log)
