"""Kernels run on a GPU where there is one, else in Triton's interpreter, which `tests/conftest.py` chooses."""

from collections.abc import Iterator
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


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """Everything is as on a GPU, in Triton's interpreter where there is none, which runs one program at a time."""
    from fewstep.kernels import adaptive_norm_triton, dispatch, rotary_triton

    monkeypatch.setattr(adaptive_norm_triton, "PROGRAMS", 2)
    monkeypatch.setattr(rotary_triton, "PROGRAMS", 2)
    monkeypatch.setattr(dispatch, "suits_triton", lambda tensor: tensor.dtype != torch.float64)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions would hide the difference


@pytest.fixture
def slow_convolutions() -> Iterator[None]:
    """Without oneDNN, which writes machine code for every shape: it takes longer than all else with tiny networks."""
    torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(True)
