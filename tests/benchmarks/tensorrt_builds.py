"""TensorRT engines of a student for GPUs that need not be there: how large they are, and how long building takes.

Needs TensorRT for RTX (`pip install "fewstep[tensorrt]"`). Compare CPU time, which what else runs does not slow.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewstep.app.machine import machine
from fewstep.export import tensorrt as target
from fewstep.export.graph import Graph
from fewstep.export.source import Source
from fewstep.runtime.engines.tensorrt import tensorrt
from fewstep.runtime.files import write_json

MEBIBYTE = 1024**2


def measure(graph: Graph, capability: int, precision: str) -> dict[str, Any]:
    """Convert and build one graph.

    Args:
        graph: in float32.
        capability: of the GPU, such as 89.
        precision: of the arithmetic.
    """
    wall, processor = time.perf_counter(), time.process_time()
    model, kept = target.convert(graph, precision)
    engine = target.build(model, capability, refittable=False)
    return {
        "capability": capability,
        "precision": precision,
        "graph_mib": round(graph.model.ByteSize() / MEBIBYTE, 1),
        "engine_mib": round(len(engine) / MEBIBYTE, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "seconds": round(time.perf_counter() - wall, 1),
        "operators": len(graph.model.graph.node),
        "float32": kept,
    }


def report(source: Source, capabilities: Sequence[int], precisions: Sequence[str]) -> dict[str, Any]:
    """Every graph of a student for every GPU in every precision."""
    library = tensorrt()
    rows = [
        {"graph": name, **measure(graph, capability, precision)}
        for (name, graph), capability, precision in product(source.graphs.items(), capabilities, precisions)
    ]
    versions = {"library": f"{library.__name__} {library.__version__}", "weights": source.card.weights}
    return {"machine": machine(), **versions, "steps": source.steps, "rows": rows}


def show(results: dict[str, Any]) -> None:
    """Print the rows."""
    table = Table(title=f"engines of {results['library']}")
    columns = ("graph", "capability", "precision", "graph_mib", "engine_mib", "cpu_seconds", "seconds")
    for column in columns:
        table.add_column(column)
    for row in results["rows"]:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student", type=Path, help="the student's directory")
    parser.add_argument("--out", type=Path, required=True, help="receives the numbers")
    parser.add_argument("--capabilities", nargs="+", type=int, default=[89, 120])
    parser.add_argument("--precisions", nargs="+", choices=("fp16", "bf16", "fp32", "fp8"), default=["fp16", "bf16"])
    given = parser.parse_args(arguments)
    results = report(Source(given.student), given.capabilities, given.precisions)
    show(results)
    write_json(given.out, results)


if __name__ == "__main__":
    main(sys.argv[1:])
