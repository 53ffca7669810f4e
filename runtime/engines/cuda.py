"""Calls of a torch module on a GPU: inputs and results through pinned memory, the work as one CUDA graph if wanted."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..errors import FewstepError
from . import Arrays

MOST_SHAPES = 8
"""Batch sizes that are kept ready: each holds its buffers and, captured, the module's activations."""
WARM_UP_RUNS = 2
"""Before a capture: compiles kernels and lets libraries allocate their workspaces, neither of which can be captured."""


class CudaCalls:
    """A module on a GPU, with buffers kept for each batch size.

    Args:
        module: on the device, for inference.
        device: a GPU.
        capture: replay each batch size as a CUDA graph instead of launching its kernels one by one.
    """

    def __init__(self, module: nn.Module, device: torch.device, capture: bool) -> None:
        self._module, self._device, self._capture = module, device, capture
        self._calls: OrderedDict[tuple[Any, ...], _Call] = OrderedDict()
        self._lock = Lock()

    def __call__(self, arrays: Arrays) -> npt.NDArray[Any]:
        """Run the module; one call at a time, since the buffers are shared.

        Raises:
            FewstepError: the module cannot be captured.
        """
        shapes = tuple((name, array.shape, array.dtype.str) for name, array in sorted(arrays.items()))
        with self._lock, torch.cuda.device(self._device):
            if shapes not in self._calls:
                if len(self._calls) >= MOST_SHAPES:
                    self._calls.popitem(last=False)
                self._calls[shapes] = _Call(self._module, arrays, self._device, self._capture)
            self._calls.move_to_end(shapes)
            return self._calls[shapes](arrays)


class _Call:
    """Buffers of one batch size, pinned on the host and fixed on the device, and the work between them."""

    def __init__(self, module: nn.Module, arrays: Arrays, device: torch.device, capture: bool) -> None:
        self.host = {name: torch.from_numpy(np.array(array)).pin_memory() for name, array in arrays.items()}
        self.inputs = {name: value.to(device) for name, value in self.host.items()}
        self.run = _captured(module, self.inputs) if capture else partial(module, **self.inputs)
        self.result: Tensor | None = None

    def __call__(self, arrays: Arrays) -> npt.NDArray[Any]:
        for name, array in arrays.items():
            self.host[name].numpy()[...] = array
            self.inputs[name].copy_(self.host[name], non_blocking=True)
        output: Tensor = self.run()
        if self.result is None:
            self.result = torch.empty_like(output, device="cpu", pin_memory=True)
        self.result.copy_(output, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return self.result.numpy().copy()


def _captured(module: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The module's work on these inputs as one launch; every replay writes the same result."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP_RUNS):
            module(**inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output: Tensor = module(**inputs)
    except RuntimeError as error:
        raise FewstepError("this network cannot run as a CUDA graph: leave cuda_graphs out") from error

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
