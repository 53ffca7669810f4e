"""The torch engine: any module of tensors, in float32; on a GPU with fused operations; compiled if wanted."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from ...kernels.patch import apply
from ..errors import FewstepError, first_line
from ..trajectory import Pixels, Trajectory
from . import COMPILED, PIXELS, TORCH, Arrays, Engine, Engines
from .cuda import CudaCalls


class TorchEngine:
    """Runs a module by the names of its forward arguments.

    Args:
        module: takes and returns tensors with the batch first.
        device: where it runs.
        output: name of the result.
        cuda_graphs: on a GPU, capture the module once for each batch size, and replay it as one launch.
        compiled: through `torch.compile`, once for each batch size.

    Raises:
        FewstepError: it is to be compiled, and there is no C++ compiler.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        output: str = PIXELS,
        cuda_graphs: bool = False,
        compiled: bool = False,
    ) -> None:
        self.module, self.device, self.output = module.to(device).eval(), device, output
        self._compiled = compiled
        if device.type == "cuda":
            apply(self.module)
            self._on_cuda = CudaCalls(self.module, device, cuda_graphs)
        if compiled:
            require_compiler(f"the engine {COMPILED}")
            with warnings.catch_warnings():  # what torch imports for it warns of torch's own deprecations
                warnings.simplefilter("ignore")
                self.module.compile(dynamic=False)

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the module; `FewstepError` if it cannot be compiled."""
        if not self._compiled:
            return self._run(arrays)
        with _explained():
            return self._run(arrays)

    @torch.inference_mode()
    def _run(self, arrays: Arrays) -> Arrays:
        if self.device.type == "cuda":
            return {self.output: self._on_cuda(arrays)}
        tensors = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        return {self.output: self.module(**tensors).cpu().numpy()}


def require_compiler(user: str) -> None:
    """Raise `FewstepError` if torch finds no C++ compiler for `user`, the subject of the sentence."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise FewstepError(
            f"{user} compiles C++, and there is no compiler here: install g++ (on Debian, `apt-get install g++`), or "
            "set CXX to another"
        ) from error


@contextmanager
def _explained() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise FewstepError(
            f"torch cannot compile this network ({first_line(error)}): take the engine {TORCH}"
        ) from error


def torch_engines(
    trajectory: Trajectory,
    sample_shape: tuple[int, int, int],
    device: torch.device,
    text_encoder: Engine | None = None,
    cuda_graphs: bool = False,
) -> Engines:
    """A trajectory in torch, as the other engines run it: noise and condition to pixels."""
    engine = TorchEngine(Pixels(trajectory), device, cuda_graphs=cuda_graphs)
    return Engines(TORCH, engine, text_encoder, trajectory.draws, sample_shape)
