"""Kernels compiled ahead of time, for any GPU and without one.

Every `*_triton.py` lists in `configurations(dtype)` how its kernels are launched there.
"""

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that fewstep supports: Ampere twice, Ada, Hopper, Blackwell twice."""


@dataclass(frozen=True)
class Configuration:
    """One way that a kernel is launched.

    Args:
        name: of the kernel and what sets this launch of it apart, `forward-1024` say.
        kernel: a function under `triton.jit`.
        types: Triton's type of each run-time parameter by its name: `*fp16`, `i64`, `fp32`.
        constants: value of each compile-time parameter by its name.
        warps: 32 threads each, that run one program.
        stages: of software pipelining.
        lowest_capability: the first that has the instructions (8-bit floats: 89).
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    lowest_capability: int = 80


@dataclass(frozen=True)
class Compiled:
    """Machine code of a kernel, and what it takes of a GPU.

    Args:
        ptx: NVIDIA's portable assembly.
        cubin: machine code of one GPU generation.
        registers: of each thread, 255 at most.
        spilled_bytes: of each thread's local memory: values that found no register.
        shared_bytes: of each program's shared memory.
    """

    ptx: str
    cubin: bytes
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_kernel(configuration: Configuration, capability: int) -> Compiled:
    """Compile for a compute capability, `90` say; Triton's interpreter must be off in this process."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(configuration.constants)
    signature = dict(configuration.types) | dict.fromkeys(constants, "constexpr")
    # Torch's allocations are aligned, and a launch with aligned pointers compiles to wider loads.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(_kinds(configuration)) if kind[0] == "*"
    }
    source = ASTSource(configuration.kernel, signature, constants, aligned)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers = _find(r"Used (\d+) registers", log.getvalue())
    spilled = _find(r"(\d+) bytes spill stores", log.getvalue())
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], registers, spilled, compiled.metadata.shared)


def _kinds(configuration: Configuration) -> list[str]:
    """Types of all parameters, in the order in which the kernel takes them."""
    names: list[str] = configuration.kernel.arg_names
    return [configuration.types.get(name, "constexpr") for name in names]


def _find(pattern: str, log: str) -> int:
    """A figure that NVIDIA's assembler logged."""
    found = re.search(pattern, log)
    assert found, log
    return int(found[1])
