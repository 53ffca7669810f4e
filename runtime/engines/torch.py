"""The torch engine: any module of tensors, in float32; on a GPU with fused operations, compiled if wanted."""

from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from ...kernels.patch import apply
from ..trajectory import Pixels, Trajectory
from . import PIXELS, Arrays, Engine, Engines
from .cuda import CudaCalls


class TorchEngine:
    """Runs a module by the names of its forward arguments.

    Args:
        module: takes and returns tensors with the batch first.
        device: where it runs.
        output: name of the result.
        cuda_graphs: on a GPU, capture the module once for each batch size, and replay it as one launch.
        compiled: on a GPU, through `torch.compile`, once for each batch size.
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
        if device.type == "cuda":
            apply(self.module)
            if compiled:
                self.module.compile(dynamic=False)
            self._on_cuda = CudaCalls(self.module, device, cuda_graphs)

    @torch.inference_mode()
    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the module."""
        if self.device.type == "cuda":
            return {self.output: self._on_cuda(arrays)}
        tensors = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        return {self.output: self.module(**tensors).cpu().numpy()}


def torch_engines(
    trajectory: Trajectory,
    sample_shape: tuple[int, int, int],
    device: torch.device,
    text_encoder: Engine | None = None,
    cuda_graphs: bool = False,
) -> Engines:
    """A trajectory in torch, as the other engines run it: noise and condition to pixels."""
    engine = TorchEngine(Pixels(trajectory), device, cuda_graphs=cuda_graphs)
    return Engines("torch", engine, text_encoder, trajectory.draws, sample_shape)
