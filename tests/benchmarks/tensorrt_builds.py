"""TensorRT engines of a student for GPUs that need not be there: how large they are, and how long building takes.

`--unet` builds those of a network of the size of Stable Diffusion 1.5's instead, of random weights: it takes 12 GiB.

Needs TensorRT for RTX (`pip install "fewstep[tensorrt]"`). Compare CPU time, which what else runs does not slow.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fewstep.app.machine import machine
from fewstep.export import tensorrt as target
from fewstep.export.graph import part_graph
from fewstep.export.precision import to_half
from fewstep.export.source import Source
from fewstep.runtime.engines.tensorrt import tensorrt
from fewstep.runtime.files import write_json

MEBIBYTE = 1024**2


def measure(model: Any, capability: int, precision: str) -> dict[str, Any]:
    """Build one graph.

    Args:
        model: an `onnx.ModelProto`, in the precision.
        capability: of the GPU, such as 89.
        precision: of the arithmetic.
    """
    wall, processor = time.perf_counter(), time.process_time()
    engine = target.build(model, capability, refittable=False)
    return {
        "capability": capability,
        "precision": precision,
        "graph_mib": round(model.ByteSize() / MEBIBYTE, 1),
        "engine_mib": round(len(engine) / MEBIBYTE, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "seconds": round(time.perf_counter() - wall, 1),
        "operators": len(model.graph.node),
    }


def of_student(source: Source, capabilities: Sequence[int], precisions: Sequence[str]) -> dict[str, Any]:
    """Every graph of a student for every GPU in every precision."""
    rows = []
    for (name, graph), precision in product(source.graphs.items(), precisions):
        model, kept = target.convert(graph, precision)
        rows += [
            {"graph": name, **measure(model, capability, precision), "float32": kept} for capability in capabilities
        ]
    return {"weights": source.card.weights, "steps": source.steps, "rows": rows}


def of_unet(capabilities: Sequence[int], precision: str) -> dict[str, Any]:
    """A network of 860 million random weights, for latents of 64 x 64."""
    model = unet()
    kept = to_half(model, precision)  # in place: a copy takes 3.2 GiB
    rows = [{"graph": "unet", **measure(model, capability, precision), "float32": kept} for capability in capabilities]
    return {"weights": "random", "rows": rows}


def unet() -> Any:
    """Its `onnx.ModelProto`."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    example = {
        "sample": torch.randn(2, 4, 64, 64),
        "timestep": torch.tensor([999, 499]),
        "encoder_hidden_states": torch.randn(2, 77, 768),
    }
    return part_graph(network, example, ["out_sample"], {}).model


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
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--student", type=Path, help="the student's directory")
    subject.add_argument("--unet", action="store_true", help="a network of the size of Stable Diffusion 1.5's")
    parser.add_argument("--out", type=Path, required=True, help="receives the numbers")
    parser.add_argument("--capabilities", nargs="+", type=int, default=[89, 120])
    parser.add_argument("--precisions", nargs="+", choices=("fp16", "bf16", "fp32", "fp8"), default=["fp16", "bf16"])
    given = parser.parse_args(arguments)
    library = tensorrt()
    if given.unet:
        found = of_unet(given.capabilities, given.precisions[0])
    else:
        found = of_student(Source(given.student), given.capabilities, given.precisions)
    results = {"machine": machine(), "library": f"{library.__name__} {library.__version__}", **found}
    show(results)
    write_json(given.out, results)


if __name__ == "__main__":
    main(sys.argv[1:])
