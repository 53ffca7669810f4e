"""Every kernel compiles for every GPU that is supported, ahead of time, so no GPU is needed; and keeps to registers.

Compiling all of them takes minutes: what `make resources` has recorded of an unchanged source counts, and is sampled.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fewstep.kernels.compilation import CAPABILITIES
from fewstep.kernels.resources import DTYPES, digest, modules

pytest.importorskip("triton", reason="triton is not installed: pip install triton to compile the kernels")

SPILL_LIMIT = 32
"""Bytes that each thread may write to local memory; the assembler spills a few now and then with registers to spare."""
RECORDED = Path(__file__).parents[2] / "results" / "kernels" / "resources.json"
COMPILE = """
import json, sys
from itertools import islice
from fewstep.kernels.resources import resources

for row in islice(resources(sys.argv[1], turns=True), int(sys.argv[2])):
    print(json.dumps(row))
"""
Row = dict[str, Any]


@pytest.mark.parametrize("module", modules())
def test_kernels_compile_for_every_gpu_and_keep_to_registers(module: str, tmp_path: Path) -> None:
    rows = recorded(module)
    if rows:
        (sample,) = compiled(module, tmp_path, most=1)
        assert {**sample, "module": module} in [{**row, "module": module} for row in rows], "run: make resources"
    else:
        rows = compiled(module, tmp_path)
    for row in rows:
        assert row["target"].rstrip(",af") == f"sm_{row['capability']}"
        assert 0 < row["registers"] <= 255, row
        assert row["spilled_bytes"] <= SPILL_LIMIT, row
    assert {row["dtype"] for row in rows} == set(DTYPES)
    assert max(CAPABILITIES) in {row["capability"] for row in rows} <= set(CAPABILITIES)


def recorded(module: str) -> list[Row]:
    """What was found with this source and this compiler."""
    found = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {"triton": None, "modules": {}}
    entry = found["modules"].get(module, {"digest": None})
    current = found["triton"] == version("triton") and entry["digest"] == digest(module)
    rows: list[Row] = entry["rows"] if current else []
    return rows


def compiled(module: str, cache: Path, most: int = 1_000) -> list[Row]:
    """Each kernel for each GPU in one of the dtypes."""
    # Another process: triton's interpreter, which the other tests choose, cannot compile.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-P", "-c", COMPILE, module, str(most)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
