"""The engine `torch-compiled`: torch's pictures, on a CPU too where there is a C++ compiler."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from fewstep.runtime import Pipeline
from fewstep.runtime.engines import COMPILED
from fewstep.runtime.engines.torch import TorchEngine
from fewstep.runtime.errors import FewstepError


def test_it_draws_what_torch_draws(student: Path) -> None:
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("g++ is not installed")
    pipeline, eager = (Pipeline.from_pretrained(student, name, "cpu") for name in (COMPILED, "torch"))
    expected = eager.generate("a cat", seed=3)
    found = pipeline.generate("a cat", seed=3)
    assert (found.engine, pipeline.engine_name) == (COMPILED, COMPILED)
    assert np.abs(found.arrays.astype(int) - expected.arrays).max() <= 1  # sums in another order may tip a rounding
    assert expected.arrays.std() > 1
    shown: list[npt.NDArray[np.uint8]] = []
    pipeline.generate("a cat", seed=3, preview=shown.append)  # which is watched uncompiled
    np.testing.assert_array_equal(shown[-1], expected.arrays)
    torch.compiler.reset()


def test_it_needs_a_compiler_and_says_so(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find_none)  # torch's own search
    with pytest.raises(FewstepError, match=r"^the engine torch-compiled compiles C\+\+, and there is no compiler here"):
        Pipeline.from_pretrained(student, COMPILED, "cpu")


class Stubborn(nn.Module):
    """Works, and cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        """Give it back."""
        torch.compiler.is_compiling() and torch._dynamo.graph_break()
        return x


def test_what_cannot_be_compiled_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    module = Stubborn()
    engine = TorchEngine(module, torch.device("cpu"), compiled=True)
    module.compile(fullgraph=True)
    with pytest.raises(FewstepError, match=r"^torch cannot compile this network \(.*\): take the engine torch$"):
        engine(x=np.zeros((1, 2), np.float32))
    torch.compiler.reset()
