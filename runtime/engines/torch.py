"""The torch engine: any module of tensors, eager, in float32; on a GPU with fused operations."""

from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from ...kernels.patch import apply
from . import Arrays


class TorchEngine:
    """Runs a module by the names of its forward arguments.

    Args:
        module: takes and returns tensors with the batch first.
        device: where it runs.
        output: name of the result.
    """

    def __init__(self, module: nn.Module, device: torch.device, output: str = "image") -> None:
        self.module, self.device, self.output = module.to(device).eval(), device, output
        if device.type == "cuda":
            apply(self.module)

    @torch.inference_mode()
    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the module."""
        tensors = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        return {self.output: self.module(**tensors).cpu().numpy()}
