"""Which implementation an operation runs; a GPU's tensors are feigned by torch where there is none."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fewstep.kernels import dispatch


def test_kernels_are_out_of_use_only_for_as_long_as_asked() -> None:
    pytest.importorskip("triton", reason="triton is not installed: nothing could be out of use")
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    found = [dispatch.runs_triton(x)]
    with dispatch.without_kernels():
        found.append(dispatch.runs_triton(x))
        with pytest.raises(KeyError), dispatch.without_kernels():
            raise KeyError
        found += [dispatch.runs_triton(x), dispatch.runs_fused(x)]
    assert [*found, dispatch.runs_triton(x), dispatch.runs_fused(x)] == [True, False, False, False, True, True]
