"""A phase's turn in an iteration: gradients of its shards, one step of its optimiser, its averages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor, nn

from .averaging import MovingAverage, follow
from .distribution import load_optimizer_state, make_accelerator, optimizer_state, prepare, sharded_like, whole
from .memory import activation_memory
from .phase import Average, Batch, Draws, Phase
from .trainer_config import TrainerConfig


class Turn(Generic[Batch]):
    """A phase with its optimiser.

    Args:
        phase: what is trained, on which loss.
        config: optimisation.

    Attributes:
        module: the phase as accelerate has wrapped it.
        activations: what its first forward pass kept for the backward pass, in MiB; 0 before.
    """

    def __init__(self, phase: Phase[Batch], config: TrainerConfig) -> None:
        self.phase, self.config = phase, config
        self.accelerator = make_accelerator(phase.module, config)  # its own: DeepSpeed's go with one engine each
        optimizer = torch.optim.AdamW(
            phase.module.parameters(),
            phase.learning_rate,
            betas=phase.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.module, self.optimizer = prepare(self.accelerator, phase, optimizer, config.precision)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=config.precision == "fp16")
        self.activations = 0.0
        self._updates: list[Callable[[], None]] = []

    def keep_up(self, averages: Sequence[MovingAverage | Average]) -> None:
        """After each step, update those averages whose source this phase trains."""
        trained = set(self.phase.module.modules())
        for average in averages:
            if isinstance(average, MovingAverage) and average.module in trained:
                self._updates.append(average.update)
            elif isinstance(average, Average) and average.source in trained:
                self._updates.append(partial(follow, average))

    def backward(self, shards: Iterable[tuple[Batch, Draws]], rate: float) -> dict[str, Tensor]:
        """Accumulate the mean gradient over this process's shards of a batch, and return their mean scalars.

        The step is to be `rate` times as long as at the phase's peak; DeepSpeed's engines make it here.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.learning_rate * rate
        totals: dict[str, Tensor] = {}
        for batch, draws in shards:
            with self.accelerator.accumulate(self.module):
                loss, logged = self._forward(batch, draws)
                self.accelerator.backward(self.scaler.scale(loss))
            for name, value in {"loss": loss.detach(), **logged}.items():
                share = value / self.config.accumulation
                totals[name] = totals[name] + share if name in totals else share
        return {f"{self.phase.name}/{name}": value for name, value in totals.items()}

    def _forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        if self.activations:
            return self.module(batch, draws)  # type: ignore[no-any-return]
        with activation_memory(self.phase.module) as measure:
            result = self.module(batch, draws)
        self.activations = measure()
        return result  # type: ignore[no-any-return]

    def step(self) -> dict[str, Tensor]:
        """Move the weights and their averages; return the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        norm = self.accelerator.clip_grad_norm_(self.phase.module.parameters(), self.config.gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for update in self._updates:
            update()
        norm = whole(torch.as_tensor(norm, device=self.accelerator.device))
        if self.scaler.is_enabled():  # too large for float16: the scaler has left out the step and halves its scale
            norm = norm.nan_to_num(0, 0, 0)
        return {f"{self.phase.name}/gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; all processes must call it."""
        return {
            "module": whole(self.phase.module.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self.phase.module),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            RuntimeError: the module has other parameters.
            ValueError: the optimiser has.
        """
        _load_module(self.phase.module, state["module"])
        load_optimizer_state(self.optimizer, self.phase.module, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    present = module.state_dict()
    module.load_state_dict({name: sharded_like(present.get(name, value), value) for name, value in state.items()})
