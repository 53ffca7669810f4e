"""Every kernel compiles for every GPU that is supported: ahead of time, so no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 86, 89, 90, 100, 120)  # Ampere twice, Ada, Hopper, Blackwell twice
SIGNATURES = {
    "distribution_matching_triton": {
        **dict.fromkeys(("x_pointer", "mu_fake_pointer", "mu_real_pointer", "gradient_pointer"), "*{dtype}"),
        "size": "i32",
        "BLOCK": "constexpr",
    }
}
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module("fewstep.kernels." + sys.argv[1])
source = ASTSource(module.kernel, json.loads(sys.argv[2]), {"BLOCK": module.BLOCK})
for capability in json.loads(sys.argv[3]):
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    target = next(line.split()[1] for line in compiled.asm["ptx"].splitlines() if line.startswith(".target"))
    print(json.dumps([target.rstrip(",af"), len(compiled.asm["cubin"]) > 0]))
"""


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("module", SIGNATURES)
def test_kernel_compiles_for_every_gpu(module: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton to compile the kernels")
    signature = json.dumps({name: kind.format(dtype=dtype) for name, kind in SIGNATURES[module].items()})
    command = [sys.executable, "-P", "-c", COMPILE, module, signature, json.dumps(CAPABILITIES)]
    # Another process: triton's interpreter, which the other tests choose, cannot compile.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [f"sm_{number}", True] for number in CAPABILITIES
    ]
