"""Kernels run on a GPU where there is one, else in Triton's interpreter: to be chosen before triton is imported."""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPORTED_EARLIER = "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def triton_device(device: str) -> str:
    """The device that kernels can be launched on here."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton to test the kernels' source")
    if device == "cpu" and IMPORTED_EARLIER:
        pytest.skip("triton was imported before its interpreter was chosen: run tests/kernels by itself")
    return device
