"""The torch engine: a module, run without gradients, behind the same interface as an exported graph."""

import inspect

import numpy as np
import torch
from torch import nn

from . import Arrays


class TorchEngine:
    """Runs a module on named arrays.

    Args:
        module: its `forward` names the inputs.
        device: where it runs.
        output: name of its only output.
    """

    name = "torch"

    def __init__(self, module: nn.Module, device: torch.device, output: str = "image") -> None:
        self.module = module.to(device).eval()
        self.device, self.output = device, output
        self.inputs = tuple(inspect.signature(module.forward).parameters)

    @torch.inference_mode()
    def __call__(self, **arrays: np.ndarray) -> Arrays:
        """Run once; arrays in, arrays out."""
        tensors = [torch.from_numpy(arrays[name]).to(self.device) for name in self.inputs]
        return {self.output: self.module(*tensors).float().cpu().numpy()}
