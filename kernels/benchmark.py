"""How long a kernel takes beside its torch reference, eager and compiled, and beside a copy of as many bytes.

`python -m fewstep.kernels.benchmark` prints it as JSON, on a machine with a GPU.

A kernel that only moves memory cannot beat that copy, which is its ceiling at every size.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .distribution_matching import distribution_matching_gradient, distribution_matching_gradient_reference

LATENTS = {
    "built-in": (16, 8, 8),
    "SD1.5": (4, 64, 64),
    "Sana": (32, 32, 32),
    "SDXL": (4, 128, 128),
    "SD3": (16, 128, 128),
}
BATCHES = (1, 4, 16, 64)
Call = Callable[[], object]


def benchmark_distribution_matching(
    device: torch.device, shapes: Mapping[str, tuple[int, ...]] = LATENTS, batches: Sequence[int] = BATCHES
) -> Iterator[dict[str, Any]]:
    """Time the distribution-matching gradient in float32, as training calls it.

    Args:
        device: a GPU; on a CPU the compiled reference is left out, and the kernel is the reference.
        shapes: (C, h, w) of latents, by name.
        batches: of each.

    Yields:
        Of each shape and batch the median microseconds of every variant, the GB/s that they make of the least possible
        traffic (three tensors read, one written), and their largest difference from the reference.
    """
    for name, shape in shapes.items():
        for batch in batches:
            inputs = [torch.randn(batch, *shape, device=device) for _ in range(3)]
            yield {"latent": name, "shape": [batch, *shape], **_compare(inputs, device)}


def _compare(inputs: list[Tensor], device: torch.device) -> dict[str, dict[str, float]]:
    reference = distribution_matching_gradient_reference
    variants: dict[str, Callable[..., Tensor]] = {"eager": reference, "kernel": distribution_matching_gradient}
    if device.type == "cuda":
        torch.compiler.reset()  # else it gives up after a few shapes
        variants["compiled"] = torch.compile(reference, dynamic=False)
    expected, traffic = reference(*inputs), 4 * inputs[0].nbytes
    differences = {name: float((call(*inputs) - expected).abs().max()) for name, call in variants.items()}
    calls: dict[str, Call] = {name: partial(call, *inputs) for name, call in variants.items()}
    calls["copy"] = copy_of(traffic, device)
    seconds = {name: median_seconds(call, device) for name, call in calls.items()}
    return {
        "microseconds": {name: round(1e6 * value, 2) for name, value in seconds.items()},
        "gigabytes_per_second": {name: round(traffic / value / 1e9, 1) for name, value in seconds.items()},
        "largest_difference": differences,
    }


def copy_bandwidth(device: torch.device, size: int = 2**31) -> float:
    """GB/s of a copy inside the device's memory that reads and writes `size` bytes together."""
    return round(size / median_seconds(copy_of(size, device), device, repeats=20) / 1e9, 1)


def copy_of(size: int, device: torch.device) -> Call:
    """A copy that reads and writes `size` bytes together."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def median_seconds(call: Call, device: torch.device, repeats: int = 100) -> float:
    """Median time of a call, after three to warm up.

    On a GPU its caches are emptied before each call, which also gives the launches a head start: what is measured is
    the device's time, not Python's, as long as launching takes less than that.
    """
    for _ in range(3):
        call()
    if device.type != "cuda":
        return statistics.median(_wall_seconds(call) for _ in range(repeats))
    cache = torch.empty(2**28, dtype=torch.uint8, device=device)
    event: Callable[..., Any] = torch.cuda.Event
    begins, ends = ([event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        cache.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    milliseconds: list[float] = [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
    return statistics.median(milliseconds) / 1000


def _wall_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure on the GPU, and print JSON; each row also on its way, for who is watching."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: there is nothing to measure")
    device = torch.device("cuda")
    rows = []
    for row in benchmark_distribution_matching(device):
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    found = {"copy_gigabytes_per_second": copy_bandwidth(device), "distribution_matching_gradient": rows}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
