"""NVIDIA's side of an installation, and whether torch and each engine's library can use what is here."""

import ctypes
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from .findings import Finding, Verdict

ONNX_ON_CUDA = ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")
"""What ONNX Runtime loads for a GPU, in this order."""


@dataclass(frozen=True)
class Gpu:
    """What is known of NVIDIA's side.

    Args:
        driver: the driver's version; empty without one.
        driver_cuda: the newest CUDA that the driver runs, as (major, minor); None without one.
        hidden: the value of `CUDA_VISIBLE_DEVICES`, if it is set.
        torch: torch's version.
        torch_cuda: the CUDA that torch is built for; None for a build without.
        name: of the first GPU that torch can use; empty if it can use none.
        capability: its compute capability, such as 90 for 9.0.
        architectures: what torch has code for, such as `sm_90` or `compute_90`.
    """

    driver: str
    driver_cuda: tuple[int, int] | None
    hidden: str | None
    torch: str
    torch_cuda: str | None
    name: str = ""
    capability: int = 0
    architectures: tuple[str, ...] = ()


def find_gpu() -> Gpu:
    """Ask the driver and torch, which must be importable."""
    import torch

    from ..runtime.engines.device import driver_version

    there = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if there else (0, 0)
    return Gpu(
        driver=driver_version(),
        driver_cuda=_driver_cuda(),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        name=torch.cuda.get_device_name() if there else "",
        capability=10 * major + minor,
        architectures=tuple(torch.cuda.get_arch_list()) if there else (),
    )


def torch_build(gpu: Gpu) -> Finding:
    """Whether torch, driver and GPU fit together."""
    build = f"torch {gpu.torch} is built for CUDA {gpu.torch_cuda}"
    has_driver = bool(gpu.driver or gpu.driver_cuda)
    if not has_driver and gpu.torch_cuda is None:
        return Finding("torch", Verdict.GOOD, f"torch {gpu.torch} computes on the CPU, and there is no NVIDIA driver")
    if not has_driver:
        return Finding("torch", Verdict.ABSENT, f"{build}, and there is no NVIDIA driver: install one to use a GPU")
    driver = f"the driver{f' {gpu.driver}' if gpu.driver else ''}"
    if gpu.torch_cuda is None:
        sentence = f"torch {gpu.torch} computes on the CPU beside {driver}: install a build of torch for CUDA"
        return Finding("torch", Verdict.CHANGE, sentence)
    if gpu.name:
        return _architecture(gpu, build)
    newest = ".".join(map(str, gpu.driver_cuda or (0, 0)))
    if gpu.driver_cuda and gpu.driver_cuda[0] < int(gpu.torch_cuda.split(".")[0]):
        sentence = f"{build} and {driver} runs CUDA {newest} at most: update the driver, or install torch for that CUDA"
        return Finding("torch", Verdict.BROKEN, sentence)
    if gpu.hidden is not None:
        sentence = f"{build} and finds no GPU, for CUDA_VISIBLE_DEVICES is {gpu.hidden!r}: clear it to use one"
        return Finding("torch", Verdict.CHANGE, sentence)
    return Finding("torch", Verdict.BROKEN, f"{build} and cannot use the GPU of {driver}: see whether nvidia-smi can")


def onnxruntime(gpu: Gpu) -> Iterator[Finding]:
    """Whether ONNX Runtime runs where it says it does."""
    runtime: Any = _module("onnxruntime")
    if runtime is None:
        return
    label = f"ONNX Runtime {runtime.__version__}"
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        if gpu.name:
            sentence = (
                f"{label} is built for the CPU beside a GPU: pip uninstall onnxruntime, then pip install "
                '"fewstep[onnx-gpu]"'
            )
            yield Finding("onnxruntime", Verdict.CHANGE, sentence)
        else:
            yield Finding("onnxruntime", Verdict.GOOD, f"{label} on the CPU")
        return
    lacks = load_error(Path(runtime.__file__).parent / "capi") if gpu.name else "torch can use no GPU"
    if lacks:
        sentence = (
            f"{label} is built for CUDA and cannot use it ({lacks}): provide that, or install onnxruntime instead"
        )
        yield Finding("onnxruntime", Verdict.BROKEN, sentence)
    else:
        yield Finding("onnxruntime", Verdict.GOOD, f"{label} on the GPU")


def openvino() -> Iterator[Finding]:
    """OpenVINO's version and precision."""
    library: Any = _module("openvino")
    if library is None:
        return
    from ..runtime.engines.openvino import has_bf16

    precision = "bfloat16" if has_bf16() else "float32: this CPU has no bfloat16"
    yield Finding("openvino", Verdict.GOOD, f"OpenVINO {library.__version__} on the CPU, in {precision}")


def tensorrt(gpu: Gpu) -> Iterator[Finding]:
    """The version of TensorRT or TensorRT for RTX, and whether there is what it runs on."""
    library: Any = _module("tensorrt") or _module("tensorrt_rtx")
    if library is None:
        return
    label = f"{library.__name__} {library.__version__}"
    if gpu.name:
        yield Finding("tensorrt", Verdict.GOOD, f"{label} for {gpu.name}")
    else:
        yield Finding("tensorrt", Verdict.ABSENT, f"{label} needs a GPU that torch can use, and there is none")


def triton(gpu: Gpu) -> Iterator[Finding]:
    """What fewstep's kernels need on a GPU: Triton, and the C compiler that it calls when a kernel first runs."""
    library: Any = _module("triton")
    if not gpu.name:
        if library is not None:
            yield Finding("triton", Verdict.GOOD, f"Triton {library.__version__}, for which there is no GPU")
        return
    if library is None:
        sentence = "fewstep's kernels run as plain torch without it: pip install triton"
        yield Finding("triton", Verdict.CHANGE, sentence)
        return
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    lacks = [] if any(shutil.which(name) for name in compilers if name) else ["a C compiler"]
    lacks += [] if header.is_file() else [f"Python's header files ({header})"]
    if lacks:
        sentence = f"Triton {library.__version__} compiles a launcher in C and lacks {' and '.join(lacks)}: install it"
        yield Finding("triton", Verdict.BROKEN, sentence)
    else:
        yield Finding("triton", Verdict.GOOD, f"Triton {library.__version__}, with a C compiler")


def load_error(folder: Path, names: Sequence[str] = ONNX_ON_CUDA) -> str:
    """Why shared libraries do not load one after the other, naming what they lack; empty if they do."""
    try:
        for name in names:
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return ""


def _architecture(gpu: Gpu, build: str) -> Finding:
    """A GPU runs code of its own major version up to its minor one, and compiles what is kept as `compute`."""

    def runs(code: str) -> bool:
        kind, _, number = code.partition("_")
        version = int("".join(filter(str.isdigit, number)))
        newest = version <= gpu.capability
        return newest and (kind == "compute" or version // 10 == gpu.capability // 10)

    if any(map(runs, gpu.architectures)):
        return Finding("torch", Verdict.GOOD, f"{build} and runs on {gpu.name}, driver {gpu.driver or 'unknown'}")
    listed = ", ".join(gpu.architectures)
    sentence = f"{build} for {listed} and has no code for {gpu.name} (sm_{gpu.capability}): install a build that has"
    return Finding("torch", Verdict.BROKEN, sentence)


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA of the driver, by its library; None without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _module(name: str) -> Any:
    """An optional library; None if it is not installed or, which is found out elsewhere, does not load."""
    if util.find_spec(name) is None:
        return None
    try:
        return __import__(name)
    except Exception:
        return None
