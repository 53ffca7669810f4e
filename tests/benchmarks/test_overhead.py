"""The measurement of the trainer's overhead: that it compares like with like, and what it writes; never the times."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fewstep.training.teacher import TeacherConfig

from .overhead import PLAIN, Setup, report, run_alone

TINY = Setup(torch.device("cpu"), "no", batch=2, iterations=2, blocks=2, network=TeacherConfig(layers=1, heads=2))
Call = tuple[int, bool, bool, bool]


@contextmanager
def network_calls() -> Iterator[list[Call]]:
    """Of each call of a network: batch size, and whether gradients go to its input, to its weights, or anywhere."""
    calls: list[Call] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, SanaTransformer2DModel):
            weight, trained = next(module.parameters()), torch.is_grad_enabled()
            calls.append((len(inputs[0]), inputs[0].requires_grad, trained and weight.requires_grad, trained))

    handle = register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("method", PLAIN)
def test_plain_loop_calls_the_networks_as_the_trainer_does(method: str) -> None:
    with network_calls() as plain:
        run_alone("plain", method, TINY)
    with network_calls() as trainer:
        run_alone("trainer", method, TINY)
    assert len(plain) == {"dmd2": 7, "lcm": 6}[method]
    assert trainer[-len(plain) :] == plain  # the watchdog has looked at the student before


def test_report_holds_a_ratio_of_time_and_memory_for_each_method() -> None:
    found = report(["dmd2", "lcm"], TINY, peak=lambda side, method: run_alone(side, method, TINY))
    assert found.keys() == {"machine", "device", "precision", "batch", "blocks", "iterations", "dmd2", "lcm"}
    for method in PLAIN:
        times, memory = found[method]["step_time"], found[method]["peak_memory"]
        assert times.keys() == {"ratio", "ratios", "trainer_milliseconds", "plain_milliseconds"}
        assert len(times["ratios"]) == TINY.blocks
        assert min(times["ratios"]) <= times["ratio"] <= max(times["ratios"])
        assert memory["ratio"] == pytest.approx(memory["trainer_mib"] / memory["plain_mib"], abs=1e-4)
