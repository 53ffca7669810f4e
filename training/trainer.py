"""The one training loop: turns of the phases, learning rate, checkpoints, and what happens when training diverges.

A method says what is trained and on which loss (`Phase`); everything that has nothing to do with the method happens
here. The global batch of an iteration is cut into shards, one for each micro-batch of each process. All randomness is
derived from (seed, step, phase, shard), so a run that was interrupted goes on exactly where its checkpoint stands, and
two processes compute what one does that accumulates two micro-batches.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..runtime.errors import FewstepError, require
from .averaging import MovingAverage
from .checkpoint import DivergenceError, Progress, plain, read_checkpoint, require_same_recipe, write_checkpoint
from .distribution import gathered, make_accelerator, release
from .memory import checkpoint_activations, peak_memory
from .numerics import all_finite, attention_for, seed_layers, step_draws
from .phase import Average, Batch, Draws, Phase
from .progress import training_progress
from .recorder import Recorder
from .trainer_config import TrainerConfig
from .turn import Turn
from .watch import Watch

MOST_ROLLBACKS = 5

Batch_co = TypeVar("Batch_co", covariant=True)


class Batches(Protocol[Batch_co]):
    """Where batches come from; the same arguments give the same batch."""

    def __call__(self, step: int, phase: int) -> Batch_co:
        """The batch of one phase, `step` batches into its data; each shard of an iteration has a `step` of its own."""
        ...


def train(
    phases: list[Phase[Batch]],
    batches: Batches[Batch],
    exported: nn.Module,
    config: TrainerConfig,
    out: Path,
    on_checkpoint: Callable[[int], Sequence[Path]] | None = None,
    averages: Sequence[Average] = (),
    recipe: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Progress:
    """Train until the budget is spent; continue from `out/state.pt` where there is one.

    Under `accelerate launch` every process calls this with the same arguments; only the main process writes, and only
    there `on_checkpoint` and `watch` are called.

    Args:
        phases: run in this order in every iteration.
        batches: gives each phase its batches.
        exported: the module whose moving average is the result; it holds that average in the end.
        config: budget and optimisation.
        out: folder for the checkpoint `state.pt` and for what `Recorder` writes.
        on_checkpoint: called with the step after each checkpoint, while `exported` holds its average; the picture files
            that it has written (sample grids) go into TensorBoard too.
        averages: further moving averages, which the losses read.
        recipe: whatever else must stay the same when the run is continued.
        watch: looks at every point of the curve; with `config.rollback` its verdict brings back the last checkpoint.

    Returns:
        Where the run stands in the end.

    Raises:
        FewstepError: training diverges, a batch holds NaN, the checkpoint belongs to another recipe or cannot be
            written, or accelerate is configured for something unsupported.
    """
    trainer = _Trainer(phases, batches, exported, config, out, averages, recipe or {}, watch)
    trainer.run(on_checkpoint)
    return trainer.progress


class _Trainer(Generic[Batch]):
    def __init__(
        self,
        phases: list[Phase[Batch]],
        batches: Batches[Batch],
        exported: nn.Module,
        config: TrainerConfig,
        out: Path,
        averages: Sequence[Average],
        recipe: Mapping[str, Any],
        watch: Watch | None,
    ) -> None:
        self.batches, self.config, self.out, self.averages, self.watch = batches, config, out, averages, watch
        if config.gradient_checkpointing:
            for phase in phases:
                checkpoint_activations(phase.module)
        self.accelerator = make_accelerator(exported, config)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.shards = self.accelerator.num_processes * config.accumulation
        self.turns = [Turn(phase, config) for phase in phases]
        self.modules = [turn.module for turn in self.turns]
        self.ema = MovingAverage(exported, config.ema_decay)
        for turn in self.turns:
            turn.keep_up([self.ema, *averages])
        self.progress = Progress()
        self.metrics: dict[str, Tensor] = {}
        self.recipe = plain({**recipe, **self._recipe()})
        self.path = out / "state.pt"
        self.resumed = bool(self._of_main(self.path.exists()))
        self.seen = self._load() if self.resumed else None

    def _recipe(self) -> dict[str, Any]:
        phases = {
            turn.phase.name: {name: getattr(turn.phase, name) for name in ("learning_rate", "every", "betas")}
            for turn in self.turns
        }
        trainer = {name: value for name, value in asdict(self.config).items() if name != "accumulation"}
        return {"trainer": trainer, "phases": phases, "processes x accumulation": self.shards}

    def run(self, on_checkpoint: Callable[[int], Sequence[Path]] | None) -> None:
        self._begin_watch()
        self.started = time.monotonic() - self.progress.seconds
        files = closing(Recorder(self.out, self.progress.step)) if self.main else nullcontext()
        with files as self.recorder, training_progress(self._fraction, shown=self.main) as self.report:
            if self.config.rollback and not self.resumed:
                self._save()
            while self._fraction() < 1:
                try:
                    self._reach_checkpoint()
                except DivergenceError as collapse:
                    self._roll_back(collapse)
                if self._fraction() == 1 or self._sound():
                    self._save()
                if on_checkpoint:
                    with self.ema.in_place(), gathered(self.modules):
                        self._on_main(lambda: self._show(on_checkpoint))
        self.ema.swap()
        for turn in self.turns:
            release(turn.module, turn.phase.module)

    def _fraction(self) -> float:
        return self.progress.fraction(self.config)

    def _reach_checkpoint(self) -> None:
        """Train until a checkpoint is due; its weights are finite."""
        progress, config = self.progress, self.config
        before, due = progress.seconds, False
        while not due:
            self._iteration()
            progress.step += 1
            logged = progress.step % config.log_every == 0
            # To ask for the main process's clock is to wait for it, so several processes do that now and then only.
            if logged or self.accelerator.num_processes == 1 or self._fraction() == 1:
                progress.seconds = self._of_main(time.monotonic() - self.started)
            due = self._fraction() == 1 or progress.seconds - before > 60 * config.checkpoint_minutes
            if logged or due:
                self._settle()
            if logged:
                self._log()

    def _iteration(self) -> None:
        """One turn of each phase that does not rest."""
        rate = self.progress.rate(self.config)
        for index, turn in enumerate(self.turns):
            if self.progress.step % turn.phase.every:
                continue
            with gathered(self.modules), attention_for(self.device.type):
                for other in self.turns:
                    other.phase.module.requires_grad_(other is turn)
                self.metrics |= turn.backward(self._shards(index), rate)
            self.metrics |= turn.step()

    def _shards(self, phase: int) -> Iterator[tuple[Batch, Draws]]:
        """This process's pieces of the global batch, each with its randomness."""
        seed, step = self.config.seed, self.progress.step
        first = self.accelerator.process_index * self.config.accumulation
        for shard in range(first, first + self.config.accumulation):
            seed_layers(seed, step * self.shards + shard, phase, self.device)
            draws = step_draws(seed, step, phase, self.device, shard, self.shards)
            yield self.batches(step * self.shards + shard, phase), draws

    def _settle(self) -> None:
        """Turn the last scalars into numbers, the mean over all processes.

        Raises:
            FewstepError: one is not finite.
        """
        names = sorted(self.metrics)
        values = torch.stack([self.metrics[name].float() for name in names])
        values = self.accelerator.reduce(values, "mean").tolist()
        point = dict(zip(names, values, strict=True))
        if not all(map(math.isfinite, values)):
            self._require_finite_batches()
            raise DivergenceError(
                f"training diverged at step {self.progress.step} ({point}): lower the learning rate and run it again; "
                f"it continues from the last good checkpoint in {self.out}, or starts anew where there is none"
            )
        self.progress.latest, self.progress.settled = point, self.progress.step

    def _require_finite_batches(self) -> None:
        """Batches can be asked for again: was it one of those since the last finite scalars that brought NaN in?"""
        for step in range(self.progress.settled, self.progress.step):
            for index, turn in enumerate(self.turns):
                for shard in range(0 if step % turn.phase.every else self.shards):
                    if not all_finite(self.batches(step * self.shards + shard, index)):
                        raise FewstepError(
                            f"a batch of step {step + 1} holds NaN or infinite values: find and replace the damaged "
                            f"samples of the data; earlier checkpoints in {self.out} are intact"
                        )

    def _log(self) -> None:
        progress = self.progress
        progress.curve.append({"step": progress.step, "seconds": round(progress.seconds, 1), **progress.latest})
        if self.recorder:
            self.recorder.point(progress.step, progress.latest)
        self.report(progress.step, progress.latest)
        if self.watch and self._collapsed(self.watch) and self.config.rollback:
            raise DivergenceError(
                f"training collapsed at step {progress.step}: lower the learning rate and run it again"
            )

    def _begin_watch(self) -> None:
        """Give the watch what it had seen at the checkpoint, or let it take its first look."""
        if not self.watch:
            return
        if self.seen is None:
            self._reset(self.watch)
        elif self.main:
            self.watch.load_state_dict(self.seen)

    def _reset(self, watch: Watch) -> None:
        with gathered(self.modules):
            self._on_main(lambda: watch.reset(self.progress.step))

    def _collapsed(self, watch: Watch) -> bool:
        with gathered(self.modules):
            return bool(self._of_main(self.main and watch(self.progress.step, self.progress.latest)))

    def _sound(self) -> bool:
        """Whether to keep this state: where nobody will go back on purpose, every finite one."""
        if not (self.watch and self.config.rollback):
            return True
        with gathered(self.modules):
            return bool(self._of_main(self.main and self.watch.sound()))

    def _roll_back(self, collapse: DivergenceError) -> None:
        """Go back to the last checkpoint with half the learning rates; the time spent stays spent."""
        rollbacks, seconds = self.progress.rollbacks + 1, self.progress.seconds
        if not self.config.rollback or rollbacks > MOST_ROLLBACKS:
            raise collapse
        self._load()
        self.progress.rollbacks, self.progress.seconds = rollbacks, seconds
        if self.watch:
            self._reset(self.watch)

    def _save(self) -> None:
        state = {
            "recipe": self.recipe,
            "progress": asdict(self.progress),
            "turns": [turn.state_dict() for turn in self.turns],
            "ema": self.ema.state_dict(),
            "averages": [average.module.state_dict() for average in self.averages],
            "watch": self.watch.state_dict() if self.watch and self.main else None,
        }
        self._on_main(lambda: self._write(state))

    def _write(self, state: dict[str, Any]) -> None:
        assert self.recorder
        write_checkpoint(self.path, state)
        activations = {turn.phase.name: round(turn.activations, 3) for turn in self.turns}
        memory = {"peak_mib": peak_memory(self.device), "activations_mib": activations}
        self.recorder.save(self.progress.curve, memory, last=self._fraction() == 1)

    def _show(self, on_checkpoint: Callable[[int], Sequence[Path]]) -> None:
        assert self.recorder
        self.recorder.pictures(self.progress.step, on_checkpoint(self.progress.step))

    def _load(self) -> Any:
        """Go on from the checkpoint; returns what the watch had seen then, if one was there."""
        state = read_checkpoint(self.path)
        require_same_recipe(self.path, state["recipe"], self.recipe)
        try:
            for turn, saved in zip(self.turns, state["turns"], strict=True):
                turn.load_state_dict(saved)
            self.ema.load_state_dict(state["ema"])
            for average, weights in zip(self.averages, state["averages"], strict=True):
                average.module.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            raise FewstepError(
                f"{self.path} does not fit these networks: give another --out, or the recipe it began with"
            ) from error
        self.progress = Progress(**state["progress"])
        self.metrics = {name: torch.tensor(value, device=self.device) for name, value in self.progress.latest.items()}
        return state["watch"]

    def _on_main(self, act: Callable[[], None]) -> None:
        """Let the main process act while the others wait."""
        if self.main:
            act()
        self.accelerator.wait_for_everyone()

    def _of_main(self, value: float) -> float:
        """The main process's value, on every process."""
        if self.accelerator.num_processes == 1:
            return value
        utils = require("accelerate.utils", "train")
        return float(utils.broadcast(torch.tensor(value, dtype=torch.float64, device=self.device)))
