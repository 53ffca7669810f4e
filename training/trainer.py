"""The one training loop: phases, precision, learning rate, EMA, checkpoints, curve.

A method says what is trained and on which loss (`Phase`); everything that has nothing to do with the method happens
here. All randomness of a step is derived from (seed, step, phase), so a run that was interrupted goes on exactly where
its checkpoint stands.
"""

import json
import math
import pickle  # for the name of an error: checkpoints are read with weights_only
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..runtime.errors import FewstepError, require
from ..runtime.files import atomic_path
from .picture import save_curves
from .progress import training_progress

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)
Loss = tuple[Tensor, dict[str, Tensor]]
"""The scalar to minimise, and scalars worth logging by name."""


@dataclass(frozen=True)
class Phase(Generic[Batch]):
    """One optimiser's share of an iteration.

    Args:
        name: appears in logs and checkpoints.
        module: its parameters are trained, and only they receive gradients.
        loss: pure computation from a batch and the step's source of randomness.
        learning_rate: peak rate of AdamW.
        every: runs in iterations that `every` divides.
        betas: AdamW's.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, torch.Generator], Loss]
    learning_rate: float
    every: int = 1
    betas: tuple[float, float] = (0.9, 0.99)


class Batches(Protocol[Batch_co]):
    """Where batches come from; the same arguments give the same batch."""

    def __call__(self, step: int, phase: int) -> Batch_co:
        """The batch of one phase of one iteration."""
        ...


@dataclass(frozen=True)
class TrainerConfig:
    """How long and how to train.

    Args:
        iterations: at most this many.
        minutes: stop, with the rate decayed to zero, when this much training time is spent (resumed time included);
            0: no limit.
        seed: of everything random.
        warmup: iterations over which the rate rises from 0.
        decay: the share of the run, at its end, over which the rate falls linearly to 0.
        weight_decay: AdamW's.
        gradient_norm: gradients are clipped to this norm, per phase.
        ema_decay: of the exported weights' moving average.
        precision: `no` (float32) or `bf16` (mixed, by autocast).
        checkpoint_minutes: between checkpoints.
        log_every: iterations between points of the curve.
    """

    iterations: int = 1_000_000
    minutes: float = 0.0
    seed: int = 0
    warmup: int = 200
    decay: float = 1.0
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "bf16"
    checkpoint_minutes: float = 5.0
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.precision not in ("no", "bf16"):
            raise FewstepError(f"precision {self.precision!r} is not supported in training: choose no or bf16")


@dataclass
class _Progress:
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def fraction(self, config: TrainerConfig) -> float:
        by_time = self.seconds / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(self.step / config.iterations, by_time))


def train(
    phases: list[Phase[Batch]],
    batches: Batches[Batch],
    exported: nn.Module,
    config: TrainerConfig,
    out: Path,
    on_checkpoint: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Train until the budget is spent; continue from `out/state.pt` where there is one.

    Args:
        phases: run in this order in every iteration.
        batches: gives each phase its batch.
        exported: the module whose moving average is the result.
        config: budget and optimisation.
        out: folder for `state.pt`, `curve.jsonl` and `curve.png`.
        on_checkpoint: called with the averaged module and the step after each checkpoint (for sample grids).

    Returns:
        `exported` with its averaged weights.

    Raises:
        FewstepError: the loss is no longer finite, or the checkpoint belongs to another run.
    """
    trainer = _Trainer(phases, batches, exported, config, out)
    return trainer.run(on_checkpoint)


class _Trainer(Generic[Batch]):
    def __init__(
        self, phases: list[Phase[Batch]], batches: Batches[Batch], exported: nn.Module, config: TrainerConfig, out: Path
    ) -> None:
        accelerate = require("accelerate", "train")
        require("matplotlib", "train")  # for the curve: better missed now than at the first checkpoint
        self.accelerator = accelerate.Accelerator(cpu=_on_cpu(exported))
        self.phases, self.batches, self.exported, self.config, self.out = phases, batches, exported, config, out
        self.optimizers = [_optimizer(phase, config) for phase in phases]
        self.ema = torch.optim.swa_utils.AveragedModel(
            exported, multi_avg_fn=_moving_average(config.ema_decay)
        ).requires_grad_(False)
        self.progress = _Progress()
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, on_checkpoint: Callable[[nn.Module, int], None] | None) -> nn.Module:
        config, progress = self.config, self.progress
        last_saved = time.monotonic()
        started = last_saved - progress.seconds
        metrics: dict[str, Tensor] = {}  # of each phase's last turn: phases that rest keep theirs
        with training_progress(lambda: progress.fraction(config)) as report:
            while progress.fraction(config) < 1:
                metrics |= self._iteration()
                progress.step += 1
                progress.seconds = time.monotonic() - started
                if progress.step % config.log_every == 0:
                    self._log(metrics)
                    report(progress.step, progress.curve[-1])
                if time.monotonic() - last_saved > 60 * config.checkpoint_minutes:
                    self._save(metrics)
                    if on_checkpoint:
                        on_checkpoint(self.ema.module, progress.step)
                    last_saved = time.monotonic()
        self._save(metrics)
        self.exported.load_state_dict(self.ema.module.state_dict())
        return self.exported

    def _iteration(self) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        rate = self._rate()
        for index, (phase, optimizer) in enumerate(zip(self.phases, self.optimizers, strict=True)):
            if self.progress.step % phase.every:
                continue
            for other in self.phases:
                other.module.requires_grad_(other is phase)
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate * rate
            generator = step_generator(self.config.seed, self.progress.step, index, self.accelerator.device)
            with _numerics(self.accelerator.device.type, self.config.precision):
                loss, logged = phase.loss(self.batches(self.progress.step, index), generator)
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(phase.module.parameters(), self.config.gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics |= {f"{phase.name}/loss": loss.detach(), f"{phase.name}/gradient_norm": norm.detach()}
            metrics |= {f"{phase.name}/{name}": value.detach() for name, value in logged.items()}
            if _contains(phase.module, self.exported):
                self.ema.update_parameters(self.exported)
        return metrics

    def _rate(self) -> float:
        warm = min(1.0, (self.progress.step + 1) / max(1, self.config.warmup))
        left = (1 - self.progress.fraction(self.config)) / max(self.config.decay, 1e-9)
        return warm * min(1.0, left)

    def _log(self, metrics: dict[str, Tensor]) -> None:
        point = self._finite(metrics)
        self.progress.curve.append({"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **point})

    def _finite(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        point = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, point.values())):
            raise FewstepError(
                f"training diverged at step {self.progress.step} ({point}): lower the learning rate and run it again; "
                f"it continues from the last good checkpoint in {self.out}, or starts anew where there is none"
            )
        return point

    def _save(self, metrics: dict[str, Tensor]) -> None:
        self._finite(metrics)  # a diverged state must not replace the last good one
        state = {
            "config": asdict(self.config),
            "progress": asdict(self.progress),
            "modules": [phase.module.state_dict() for phase in self.phases],
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_path(self.out / "state.pt") as temporary:
            torch.save(state, temporary)
        with atomic_path(self.out / "curve.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(point) + "\n" for point in self.progress.curve))
        if self.progress.curve:
            save_curves(self.progress.curve, self.out / "curve.png")

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise FewstepError(f"{path} is damaged: remove it to begin again") from error
        if state["config"]["seed"] != self.config.seed or len(state["modules"]) != len(self.phases):
            raise FewstepError(f"{path} belongs to another run: give the same method and seed, or another --out")
        try:
            for phase, weights in zip(self.phases, state["modules"], strict=True):
                phase.module.load_state_dict(weights)
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError) as error:
            raise FewstepError(
                f"{path} does not fit these networks: give another --out, or the recipe it began with"
            ) from error
        self.progress = _Progress(**state["progress"])


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The points that training logged into `folder`."""
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]


def training_device(name: str, threads: int = 0) -> torch.device:
    """The device to train on: `cpu`, `cuda`, or `auto` for CUDA where there is one; and the number of CPU threads.

    Raises:
        FewstepError: the device is unknown or absent.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise FewstepError(f"there is no device {name!r} here: use --device cpu")
    return torch.device(name)


_ALL_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def _numerics(device: str, precision: str) -> Iterator[None]:
    # On CPU the fused attention's backward is several times slower than the plain one; on CUDA torch chooses.
    attention = [SDPBackend.MATH] if device == "cpu" else _ALL_BACKENDS
    # Not accelerate's autocast, which allows a process one precision in its whole life.
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"), sdpa_kernel(attention):
        yield


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average whose memory grows with its age, so that no run is held back by its random start."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        weight = 1 - min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averaged, current, weight)

    return update


def _on_cpu(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "cpu"


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _optimizer(phase: Phase[Any], config: TrainerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        phase.module.parameters(), phase.learning_rate, betas=phase.betas, weight_decay=config.weight_decay, fused=True
    )


def step_generator(seed: int, step: int, phase: int, device: torch.device) -> torch.Generator:
    """The source of randomness of one phase of one iteration; the same arguments give the same numbers."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 16 + phase)
