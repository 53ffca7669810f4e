"""`python -m fewstep.kernels.resources FILE`: what every kernel takes of every GPU, found by compiling it for each.

Kernels whose source has not changed since the file was written are not compiled again.
"""

import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .benchmarks.report import write_json
from .compilation import CAPABILITIES, Configuration, compile_kernel

HERE = Path(__file__).parent
DTYPES = ("fp32", "fp16", "bf16")
Row = dict[str, Any]


def modules() -> list[str]:
    """Names of the modules that hold Triton source."""
    return sorted(path.stem for path in HERE.glob("*_triton.py"))


def configurations(module: str, dtype: str) -> list[Configuration]:
    """The module's own list."""
    found: list[Configuration] = importlib.import_module(f".{module}", __package__).configurations(dtype)
    return found


def resources(module: str, dtypes: tuple[str, ...] = DTYPES, turns: bool = False) -> Iterator[Row]:
    """Registers, spilled and shared bytes of a module's kernels.

    Args:
        module: its name.
        dtypes: of the tensors, in Triton's words.
        turns: compile a kernel once for each compute capability, the dtypes taking turns; else each dtype for all.
    """
    for turn, dtype in enumerate(dtypes):
        for configuration in configurations(module, dtype):
            for position, capability in enumerate(CAPABILITIES):
                mine = not turns or position % len(dtypes) == turn
                if mine and capability >= configuration.lowest_capability:
                    yield _row(module, dtype, configuration, capability)


def _row(module: str, dtype: str, configuration: Configuration, capability: int) -> Row:
    compiled = compile_kernel(configuration, capability)
    return {
        "module": module,
        "kernel": configuration.name,
        "dtype": dtype,
        "capability": capability,
        "target": next(line.split()[1] for line in compiled.ptx.splitlines() if line.startswith(".target")),
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_bytes": compiled.shared_bytes,
    }


def digest(module: str) -> str:
    """Of a module's source and of what it imports of this folder, the compilation among it."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources(module))).hexdigest()[:16]


def sources(module: str) -> list[Path]:
    """The module's file and those of this folder that it imports, directly or not."""
    found: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += re.findall(r"^from \.(\w+) import", (HERE / f"{name}.py").read_text("utf-8"), re.MULTILINE)
    return [HERE / f"{name}.py" for name in sorted(found)]


def measure(module: str, before: Row) -> Row:
    """A module's entry in the file, from the file `before` if its source is still the same."""
    entry: Row = before.get("modules", {}).get(module, {})
    if before.get("triton") == version("triton") and entry.get("digest") == digest(module):
        return entry
    rows = [{name: value for name, value in row.items() if name != "module"} for row in resources(module)]
    print(f"compiled {len(rows)} kernels of {module}", file=sys.stderr, flush=True)
    return {"digest": digest(module), "rows": rows}


def main(file: Path) -> None:
    """Bring the file up to date."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        entries = dict(zip(modules(), pool.map(partial(measure, before=before), modules()), strict=True))
    write_json(file, {"triton": version("triton"), "modules": entries})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
