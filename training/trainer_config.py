"""How long and how to train, whatever the method."""

from dataclasses import dataclass

from ..runtime.errors import FewstepError
from .checks import above, at_least, below_one, within
from .numerics import PRECISIONS


@dataclass(frozen=True)
class TrainerConfig:
    """Budget and optimisation.

    Args:
        iterations: at most this many.
        minutes: stop, with the rate decayed to zero, when this much training time is spent (resumed time included);
            0: no limit. The rate then follows the clock; limited by iterations alone, a run that is killed and resumed
            gives, on CPU, the same weights to the bit as one that was not.
        seed: of everything random.
        warmup: iterations over which the rate rises from 0.
        decay: the share of the run, at its end, over which the rate falls linearly to 0.
        weight_decay: AdamW's.
        gradient_norm: gradients are clipped to this norm, per phase.
        ema_decay: of the exported weights' moving average, in [0, 1).
        precision: of forward passes: `no` (float32), `bf16`, or `fp16` with a scaled loss; weights stay float32.
        accumulation: batches, one after the other on each process, whose mean gradient makes one update.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        rollback: after a collapse go back to the last checkpoint and halve the learning rates, at most 5 times.
        checkpoint_minutes: between checkpoints.
        log_every: iterations between points of the curve, where several processes look at the clock, too.
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
    accumulation: int = 1
    gradient_checkpointing: bool = False
    rollback: bool = False
    checkpoint_minutes: float = 5.0
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            choices = ", ".join(PRECISIONS)
            raise FewstepError(f"precision {self.precision!r} is not supported in training: choose one of {choices}")
        at_least(1, iterations=self.iterations, accumulation=self.accumulation, log_every=self.log_every)
        at_least(0, minutes=self.minutes, warmup=self.warmup, checkpoint_minutes=self.checkpoint_minutes)
        at_least(0, weight_decay=self.weight_decay)
        above(0, gradient_norm=self.gradient_norm)
        within(0, 1, decay=self.decay)
        below_one(ema_decay=self.ema_decay)
