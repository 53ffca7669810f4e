"""The kernels' benchmark, on shapes that a CPU gets through."""

import time

import pytest
import torch

from fewstep.kernels.benchmark import BATCHES, LATENTS, benchmark_distribution_matching, copy_of, median_seconds


def test_rows_compare_every_variant_with_a_copy_of_as_many_bytes(device: str) -> None:
    (row,) = benchmark_distribution_matching(torch.device(device), {"small": (4, 16, 16)}, (3,))
    variants = {"copy", "eager", "kernel"} | ({"compiled"} if device == "cuda" else set())
    assert row["shape"] == [3, 4, 16, 16]
    assert row["microseconds"].keys() == row["gigabytes_per_second"].keys() == variants
    assert row["largest_difference"].keys() == variants - {"copy"}
    assert max(row["largest_difference"].values()) < 1e-4
    traffic = 4 * 4 * 3 * 4 * 16 * 16  # float32 is four bytes; three tensors are read, one is written
    for variant, microseconds in row["microseconds"].items():
        assert row["gigabytes_per_second"][variant] == pytest.approx(traffic / microseconds / 1e3, rel=0.05, abs=0.1)


def test_shapes_are_those_of_the_models_that_are_distilled() -> None:
    assert {name: channels * height * width for name, (channels, height, width) in LATENTS.items()} == {
        "built-in": 1024,
        "SD1.5": 16_384,
        "Sana": 32_768,
        "SDXL": 65_536,
        "SD3": 262_144,
    }
    assert BATCHES == (1, 4, 16, 64)


def test_a_copy_reads_and_writes_the_bytes_together(device: str) -> None:
    copied = copy_of(64, torch.device(device))()
    assert isinstance(copied, torch.Tensor)
    assert copied.nbytes == 32


def test_the_median_forgives_a_slow_call() -> None:
    durations = iter([0.0] * 5 + [0.2] + [0.0] * 20)
    assert median_seconds(lambda: time.sleep(next(durations)), torch.device("cpu"), repeats=9) < 0.1
