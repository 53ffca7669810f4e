"""Kernels as PTX, NVIDIA's portable assembly, with the parameters that TensorRT passes and no others."""

import ctypes
import re
from dataclasses import dataclass

from ..kernels.compilation import Configuration, compile_kernel
from ..runtime.errors import FewstepError

SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a block may take without being allowed more, which TensorRT does not ask for."""
_ENTRY = re.compile(r"(\.visible \.entry (\w+)\()([^)]*)(\))")


@dataclass(frozen=True)
class Program:
    """A kernel that another program launches.

    Args:
        name: of its entry.
        ptx: the assembly.
        threads: of a block.
        shared_bytes: of a block.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def assemble(configuration: Configuration, capability: int) -> Program:
    """Compile a kernel to PTX that this machine's driver reads.

    Triton's interpreter must be off in this process.

    Raises:
        FewstepError: the kernel needs memory that TensorRT does not give it.
    """
    from triton import knobs

    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # it names files of this machine
        compiled = compile_kernel(configuration, capability)
    if compiled.shared_bytes > SHARED_LIMIT:
        raise FewstepError(
            f"kernel {configuration.name} takes more shared memory than a plugin may: leave --kernels out"
        )
    name, ptx = without_scratch(compiled.ptx, len(configuration.types))
    return Program(name, as_old_as(ptx, driver_ptx_version()), 32 * configuration.warps, compiled.shared_bytes)


def without_scratch(ptx: str, parameters: int) -> tuple[str, str]:
    """Drop the pointers to scratch memory that Triton adds to a kernel's own parameters.

    Args:
        ptx: of one kernel.
        parameters: how many are its own.

    Returns:
        The entry's name, and the assembly.

    Raises:
        FewstepError: the kernel uses its scratch memory, or is not as Triton writes one.
    """
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise FewstepError(f"Triton wrote {len(entries)} kernels where a plugin is one: leave --kernels out")
    head, name, declared, end = entries[0].groups()
    own, scratch = declared.split(",")[:parameters], declared.split(",")[parameters:]
    used = [each for each in scratch if len(re.findall(rf"\b{each.split()[-1]}\b", ptx)) > 1]
    if len(own) < parameters or any(".ptr" not in each for each in scratch) or used:
        raise FewstepError(f"kernel {name} needs other parameters than a plugin is given: leave --kernels out")
    start, stop = entries[0].span()
    return name, ptx[:start] + head + ",".join(own).rstrip() + "\n" + end + ptx[stop:]


def as_old_as(ptx: str, version: int | None) -> str:
    """Declare an assembly to be of a version, 87 for 8.7, if it says a later one: Triton says its assembler's latest.

    A driver refuses versions that it does not know, whatever the kernel uses of them.
    """
    found = re.search(r"^\.version (\d+)\.(\d+)$", ptx, re.MULTILINE)
    if not found or version is None or 10 * int(found[1]) + int(found[2]) <= version:
        return ptx
    return ptx[: found.start()] + f".version {version // 10}.{version % 10}" + ptx[found.end() :]


def driver_ptx_version() -> int | None:
    """The latest that NVIDIA's driver reads; None where there is no driver."""
    from triton.backends.nvidia.compiler import ptx_get_version

    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    return int(ptx_get_version(f"{version.value // 1000}.{version.value % 1000 // 10}"))
