"""Median times with cold caches, and what a device does at most: a copy's bandwidth and a matrix product's rate."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

Call = Callable[[], object]

FLUSHED_BYTES = 2**30
"""Written before each timed call. It empties the L2 cache and takes a GPU some 300 microseconds, in which Python gets
ahead: what is measured is the device's time as long as launching takes less than that."""


def median_seconds(call: Call, device: torch.device, repeats: int = 100) -> float:
    """Median time of a call, after three to warm up; on a GPU with caches emptied before each."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return statistics.median(_wall_seconds(call) for _ in range(repeats))
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    event: Callable[..., Any] = torch.cuda.Event
    begins, ends = ([event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        flushed.zero_()
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


def copy_of(size: int, device: torch.device) -> Call:
    """A copy that reads and writes `size` bytes together."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(device: torch.device, size: int = 2**31) -> float:
    """GB/s of a copy inside the device's memory that reads and writes `size` bytes together."""
    return round(size / median_seconds(copy_of(size, device), device, repeats=20) / 1e9, 1)


def matrix_rates(device: torch.device, size: int = 8192) -> dict[str, float]:
    """TFLOP/s of `size`-cubed products of random matrices, for each number format that the device multiplies."""
    return {
        name: round(2 * size**3 / median_seconds(product, device, repeats=20) / 1e12, 4)
        for name, product in _products(device, size)
    }


def _products(device: torch.device, size: int) -> Iterator[tuple[str, Call]]:
    """A product of each format; the right matrix lies transposed in memory, as a layer's weight does."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield "bf16", partial(torch.mm, left, right.T)
    narrow = [(20 * matrix).round().clamp(-127, 127).to(torch.int8) for matrix in (left, right)]
    yield "int8", partial(torch._int_mm, narrow[0], narrow[1].T)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        small = [matrix.to(torch.float8_e4m3fn) for matrix in (left, right)]
        one = torch.ones((), device=device)
        yield "fp8", partial(torch._scaled_mm, small[0], small[1].T, one, one, out_dtype=torch.bfloat16)
