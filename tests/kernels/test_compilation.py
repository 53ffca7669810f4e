"""Every kernel compiles for every GPU that is supported, ahead of time, so no GPU is needed; and fits on it.

Compiling all of them takes minutes: what `make resources` has recorded of an unchanged source counts, and is sampled.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fewstep.kernels.compilation import CAPABILITIES
from fewstep.kernels.resources import DTYPES, digest, modules

pytest.importorskip("triton", reason="triton is not installed: pip install triton to compile the kernels")

SPILL_LIMIT = 32
"""Bytes that each thread may write to local memory; the assembler spills a few now and then with registers to spare."""
SHARED_KIBIBYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a block may take, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
RECORDED = Path(__file__).parents[2] / "results" / "kernels" / "resources.json"
COMPILE = """
import json, sys
from itertools import islice
from fewstep.kernels.resources import resources

most, *modules = sys.argv[1:]
for module in modules:
    for row in islice(resources(module, turns=True), int(most)):
        print(json.dumps(row))
"""
Row = dict[str, Any]


@pytest.mark.parametrize("module", modules())
def test_kernels_compile_for_every_gpu_and_fit_on_it(module: str, tmp_path: Path) -> None:
    rows = recorded(module) or compiled([module], tmp_path)
    for row in rows:
        assert row["target"].rstrip(",af") == f"sm_{row['capability']}"
        assert 0 < row["registers"] <= 255, row
        assert row["spilled_bytes"] <= SPILL_LIMIT, row
        assert row["shared_bytes"] <= 1024 * SHARED_KIBIBYTES[row["capability"]], row
    assert {row["dtype"] for row in rows} == set(DTYPES)
    assert max(CAPABILITIES) in {row["capability"] for row in rows} <= set(CAPABILITIES)


def test_kernels_compile_to_what_is_recorded(tmp_path: Path) -> None:
    """One kernel of each module."""
    current = [module for module in modules() if recorded(module)]
    samples = compiled(current, tmp_path, most=1)
    assert len(samples) == len(current)
    for sample in samples:
        assert sample in [{**row, "module": sample["module"]} for row in recorded(sample["module"])], "make resources"


def test_only_what_is_recorded_of_this_source_and_compiler_counts(tmp_path: Path) -> None:
    file, module = tmp_path / "resources.json", modules()[0]
    assert recorded(module, file) == []
    entry = {"digest": digest(module), "rows": [{"registers": 8}]}
    for triton, name, found, counts in (
        (version("triton"), module, entry, True),
        (version("triton"), module, {**entry, "digest": "of another source"}, False),
        (version("triton"), "another module", entry, False),
        ("another version", module, entry, False),
    ):
        file.write_text(json.dumps({"triton": triton, "modules": {name: found}}))
        assert recorded(module, file) == (entry["rows"] if counts else [])


def recorded(module: str, file: Path = RECORDED) -> list[Row]:
    """What was found with this source and this compiler."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"triton": None, "modules": {}}
    entry = found["modules"].get(module, {"digest": None})
    current = found["triton"] == version("triton") and entry["digest"] == digest(module)
    rows: list[Row] = entry["rows"] if current else []
    return rows


def compiled(modules: Sequence[str], cache: Path, most: int = 1_000) -> list[Row]:
    """Each kernel for each GPU in one of the dtypes, `most` of a module."""
    # Another process: triton's interpreter, which the other tests choose, cannot compile.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-P", "-c", COMPILE, str(most), *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
