"""Kernels run on a GPU where there is one, else in Triton's interpreter, which `tests/conftest.py` chooses."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine with a GPU, tests that run on a device need it, and `-m gpu` is to find them."""
    for item in items:
        if torch.cuda.is_available() and item.path.parent == HERE and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_device(device: str) -> str:
    """The device that kernels can be launched on here."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton to test the kernels' source")
    return device
