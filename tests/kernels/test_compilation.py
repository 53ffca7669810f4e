"""Every kernel compiles for every GPU that is supported, ahead of time, so no GPU is needed; and keeps to registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.kernels.compilation import CAPABILITIES

SOURCES = sorted(path.stem for path in (Path(__file__).parents[2] / "kernels").glob("*_triton.py"))
SPILL_LIMIT = 32
"""Bytes that each thread may write to local memory; the assembler spills a few now and then with registers to spare."""
COMPILE = """
import importlib, json, sys
from fewstep.kernels.compilation import CAPABILITIES, compile_kernel

module = importlib.import_module("fewstep.kernels." + sys.argv[1])
for dtype in ("fp32", "fp16", "bf16"):
    for configuration in module.configurations(dtype):
        for capability in CAPABILITIES:
            if capability >= configuration.lowest_capability:
                compiled = compile_kernel(configuration, capability)
                target = next(line.split()[1] for line in compiled.ptx.splitlines() if line.startswith(".target"))
                name = f"{configuration.name} {dtype}"
                print(json.dumps([name, capability, target, compiled.registers, compiled.spilled_bytes]))
"""


@pytest.mark.parametrize("module", SOURCES)
def test_kernels_compile_for_every_gpu_and_keep_to_registers(module: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton to compile the kernels")
    # Another process: triton's interpreter, which the other tests choose, cannot compile.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", COMPILE, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for name, capability, target, registers, spilled in rows:
        assert target.rstrip(",af") == f"sm_{capability}"
        assert 0 < registers <= 255, name
        assert spilled <= SPILL_LIMIT, (name, capability, spilled)
    assert {capability for _, capability, *_ in rows} <= set(CAPABILITIES)
