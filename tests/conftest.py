"""What every test relies on: the installed package, fixed threads and seeds, no network, a GPU only if there is one."""

import os
import sys
from pathlib import Path

import pytest

# `python -m pytest` puts the working directory on sys.path; the folder `kernels` there would pass for a package of that
# name, which diffusers and transformers probe for.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
# Read once, when torch and the hub's client are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which diffusers does

from .analytic import Gaussian, Mixture  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def gaussian() -> type[Gaussian]:
    """An analytic teacher: `gaussian(mean, variance=0.5, schedule=Flow())`."""
    return Gaussian


@pytest.fixture
def mixture() -> type[Mixture]:
    """An analytic teacher: `mixture()`, or with means, weights, variances and a schedule."""
    return Mixture


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
