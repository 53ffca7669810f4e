"""TensorRT on an NVIDIA GPU: TensorRT itself where it is installed, else TensorRT for RTX, which has the same API."""

import os
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import FewstepError, require
from ..files import atomic_path
from . import Arrays, Engine

SUFFIX = ".engine"
_TYPES = {"FLOAT": torch.float32, "INT64": torch.int64, "UINT8": torch.uint8}
"""Of inputs and outputs, by TensorRT's names; in between, an engine computes in what its graph says."""


class TensorRtEngine:
    """A TensorRT engine with memory for its largest batch, of which a smaller one takes the beginning.

    Args:
        path: the engine's file.

    Raises:
        FewstepError: TensorRT is missing, there is no GPU, or the engine was built for another GPU or version.
    """

    def __init__(self, path: Path) -> None:
        require_gpu()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream, self._lock = torch.cuda.Stream(self._device), Lock()  # type: ignore[no-untyped-call]
        self._logger, errors = collect_errors(tensorrt())
        self._engine = read_engine(path, self._logger, errors)
        self._kernels = _Kernels(self._engine, cache_file(f"{path.stem}.kernels"))
        self._context = self._engine.create_execution_context(self._kernels.settings)
        names = [self._engine.get_tensor_name(position) for position in range(self._engine.num_io_tensors)]
        self._inputs = {name for name in names if self._engine.get_tensor_mode(name).name == "INPUT"}
        self._memory = self._allocate(names)
        self._largest = len(self._memory[names[0]])

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        """Run the engine, in parts where the batch is larger than it takes; one call at a time."""
        batch, largest = len(next(iter(arrays.values()))), self._largest
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            parts = [
                self._run({name: array[start : start + largest] for name, array in arrays.items()})
                for start in range(0, batch, largest)
            ]
            self._kernels.save(batch)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, arrays: Arrays) -> Arrays:
        for name, array in arrays.items():
            self._memory[name][: len(array)].copy_(torch.tensor(array))
            self._context.set_input_shape(name, array.shape)
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise FewstepError("TensorRT could not run its engine: free memory on the GPU, or give a smaller batch")
        batch = len(next(iter(arrays.values())))
        outputs = {name: memory[:batch] for name, memory in self._memory.items() if name not in self._inputs}
        return {name: output.cpu().numpy() for name, output in outputs.items()}  # which waits for the stream

    def _allocate(self, names: list[str]) -> dict[str, Tensor]:
        """Memory of each input and output, which the engine is told of once."""
        for name in self._inputs:
            *_, largest = self._engine.get_tensor_profile_shape(name, 0)
            self._context.set_input_shape(name, largest)
        memory = {}
        for name in names:
            shape, kind = tuple(self._context.get_tensor_shape(name)), _TYPES[self._engine.get_tensor_dtype(name).name]
            memory[name] = torch.empty(shape, dtype=kind, device=self._device)
            self._context.set_tensor_address(name, memory[name].data_ptr())
        return memory


class _Kernels:
    """How an engine runs: in TensorRT for RTX, as one CUDA graph of kernels that it compiles on this GPU, once.

    Args:
        engine: a `tensorrt.ICudaEngine`.
        file: holds the compiled kernels; the library refuses those of another GPU, driver or version.
    """

    def __init__(self, engine: Any, file: Path) -> None:
        self.settings, self._file = engine.create_runtime_config(), file
        self._batches: set[int] = set()
        self._cache: Any = None
        if tensorrt().__name__ == "tensorrt_rtx":
            self.settings.cuda_graph_strategy = tensorrt().CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._cache = self.settings.create_runtime_cache()
            if file.is_file():
                self._cache.deserialize(file.read_bytes())
            self.settings.set_runtime_cache(self._cache)

    def save(self, batch: int) -> None:
        """Store what was compiled, if this batch size is new."""
        if self._cache is None or batch in self._batches:
            return
        self._batches.add(batch)
        with suppress(FewstepError), atomic_path(self._file) as temporary:  # without it the next start is slow
            temporary.write_bytes(self._cache.serialize())


def load(folder: Path, graph: str, precision: str) -> Engine:
    """Load one graph of an export; the file itself holds the precision."""
    return TensorRtEngine(folder / f"{graph}{SUFFIX}")


def library() -> str:
    """Which TensorRT, its version and the GPU; `FewstepError` if either is missing."""
    found = tensorrt()
    require_gpu()
    return f"{found.__name__} {found.__version__} {torch.cuda.get_device_name()}"


def tensorrt() -> Any:
    """The library; TensorRT knows more GPUs than TensorRT for RTX, and times kernels when it builds."""
    return require("tensorrt" if find_spec("tensorrt") else "tensorrt_rtx", "tensorrt")


def require_gpu() -> None:
    """Raise `FewstepError` if torch finds no NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise FewstepError("TensorRT needs an NVIDIA GPU and its driver, and torch finds none: use another engine")


def read_engine(path: Path, logger: Any, errors: list[str]) -> Any:
    """A `tensorrt.ICudaEngine` from its file; `FewstepError` if it was built for another GPU or version."""
    engine = tensorrt().Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise FewstepError(f"{library()} cannot load {path} ({reason(errors)}): export it again on this machine")
    return engine


def collect_errors(library: Any) -> tuple[Any, list[str]]:
    """A logger that keeps errors, and the list that they go to."""
    errors: list[str] = []

    def log(self: Any, severity: Any, message: str) -> None:
        if severity <= library.ILogger.ERROR:
            errors.append(message)

    return type("Logger", (library.ILogger,), {"log": log})(), errors


def reason(errors: list[str]) -> str:
    """What TensorRT gives as its reason, for the middle of a sentence."""
    return errors[0].strip().rstrip(".") if errors else "without giving a reason"


def cache_file(name: str) -> Path:
    """A file of the user's for what TensorRT learns about this GPU, apart for each version of the library."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "fewstep", re.sub(r"[^A-Za-z0-9.]+", "-", library()), name)
