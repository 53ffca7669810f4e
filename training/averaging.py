"""Exponential moving averages of weights: the one that becomes the result, and those that losses read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distribution import local, sharded_like, whole
from .phase import Average


class MovingAverage:
    """An average whose memory grows with its age, so that no run is held back by its random start.

    The n-th update moves it to `d average + (1 - d) weights` with `d = min(decay, (1 + n) / (10 + n))`, n from 0; the
    first one copies the weights.

    Args:
        module: whose parameters are averaged.
        decay: the limit of `d`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.tensors = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the module's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        averages = [local(tensor) for tensor in self.tensors]
        torch._foreach_lerp_(averages, [local(parameter) for parameter in self.module.parameters()], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and their average."""
        for tensor, parameter in zip(self.tensors, self.module.parameters(), strict=True):
            current = parameter.clone()
            parameter.copy_(tensor)
            tensor.copy_(current)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module hold its average for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"updates": self.updates, "tensors": [whole(tensor) for tensor in self.tensors]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: the module has another number of parameters.
            RuntimeError: they have other shapes.
        """
        for tensor, saved in zip(self.tensors, state["tensors"], strict=True):
            tensor.copy_(sharded_like(tensor, saved))
        self.updates = state["updates"]


@torch.no_grad()
def follow(average: Average) -> None:
    """One update of an average that a loss reads."""
    averaged: list[Tensor] = list(average.module.parameters())
    torch._foreach_lerp_(averaged, [whole(current) for current in average.source.parameters()], 1 - average.decay)
