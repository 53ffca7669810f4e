"""Signs of a collapsing student, one detector each: a pure function of what has been seen so far.

A few-step student begins blurred and far from the data, so it is held against the best that it has been, not against
perfection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .checks import above, at_least, within
from .latent_statistics import Comparison


@dataclass(frozen=True)
class WatchdogConfig:
    """When a training counts as collapsing.

    Args:
        check_every: iterations between looks at the student's samples.
        samples: that each look draws; 64 one-step samples every 200 iterations of 16 take 0.3 % of DMD2's time.
        patience: looks running that must agree before samples count as collapsed: healthy ones sway for a short while.
        mean_drift: by which the latents' mean may move away from the data's, in the data's standard deviations (0.03
            in our emoji student, up to 0.5 in tiny ones at high rates; 3 and more in a collapse).
        deviation_factor: by which the latents' deviation may move away from the data's, up or down (healthy: 1.2).
        distance_factor: by which the Fréchet distance to the data may exceed its best, give or take half the data's
            variance.
        least_diversity: of the samples, as a share of their best or of the data's, whichever is less (healthy: 0.8).
        weight_growth: by which the norm of the weights may grow within 1000 iterations (healthy: 1.1; low-rank
            adapters, half of which begin at zero, grow faster).
        saturated_accuracy: mean accuracy from which a discriminator has won, in [0, 1].
        saturated_iterations: over which that mean is taken.
        weak_accuracy: mean accuracy below which a discriminator has learnt nothing, in [0, 1].
        weak_iterations: that it is given to learn something.
    """

    check_every: int = 200
    samples: int = 64
    patience: int = 2
    mean_drift: float = 1.0
    deviation_factor: float = 2.0
    distance_factor: float = 2.0
    least_diversity: float = 0.5
    weight_growth: float = 3.0
    saturated_accuracy: float = 0.98
    saturated_iterations: int = 500
    weak_accuracy: float = 0.52
    weak_iterations: int = 2000

    def __post_init__(self) -> None:
        at_least(1, check_every=self.check_every, patience=self.patience)
        at_least(1, saturated_iterations=self.saturated_iterations, weak_iterations=self.weak_iterations)
        at_least(2, samples=self.samples)
        above(0, mean_drift=self.mean_drift)
        above(1, deviation_factor=self.deviation_factor, distance_factor=self.distance_factor)
        above(1, weight_growth=self.weight_growth)
        within(0, 1, least_diversity=self.least_diversity)
        within(0, 1, saturated_accuracy=self.saturated_accuracy, weak_accuracy=self.weak_accuracy)


WEIGHT_WINDOW = 1000
"""Iterations over which the norm's growth is taken."""
DISTANCE_NOISE = 0.5
"""By which the Fréchet distance may always rise: of a best near 0.01, healthy students see many times as much."""


@dataclass
class History:
    """What has been seen, since the start or the last rollback, oldest first.

    Args:
        checks: comparisons of samples with real latents, the first from before training; None: they were not finite.
            A rollback keeps the good ones.
        weights: (iteration, norm of the student's weights).
        accuracy: (iteration, accuracy) of each discriminator, by the name it is logged under.
    """

    checks: list[Comparison | None] = field(default_factory=list)
    weights: list[tuple[int, float]] = field(default_factory=list)
    accuracy: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def finite(self) -> list[Comparison]:
        """The checks whose samples were finite."""
        return [check for check in self.checks if check]


def not_finite(history: History, config: WatchdogConfig) -> str | None:
    """NaN or infinity in the weights or the samples."""
    if history.checks[-1] and math.isfinite(history.weights[-1][1]):
        return None
    return (
        "the student's weights or samples are not finite, most likely because a step too large has broken its weights: "
        "lower its learning rate, or train with precision no"
    )


def mean_drift(history: History, config: WatchdogConfig) -> str | None:
    """A mean that has moved away from the data's."""
    drifts = [check.mean_drift for check in history.finite()]
    if not drifts or min(drifts[-config.patience :]) <= min(drifts) + config.mean_drift:
        return None
    return (
        f"the mean of the student's latents is {drifts[-1]:.2g} of the data's deviations away from the data's and was "
        f"{min(drifts):.2g}, most likely because it learns faster than the networks that teach it: lower its learning "
        "rate, or train it less often than them"
    )


def deviation_drift(history: History, config: WatchdogConfig) -> str | None:
    """A deviation that has left the data's, up or down."""
    deviations = [check.deviation for check in history.finite()]
    off = [max(deviation, 1 / deviation) if deviation else math.inf for deviation in deviations]
    if not off or min(off[-config.patience :]) <= config.deviation_factor * min(off):
        return None
    share = f"the deviation of the student's latents is {deviations[-1]:.2g} times the data's"
    if deviations[-1] < 1:
        return (
            f"{share}, most likely because it has come to answer with an average picture: lower its learning rate, and "
            "check that its loss compares distributions and not single pictures"
        )
    return (
        f"{share}, most likely because its learning rate or the teacher's guidance is too high: lower the rate first, "
        "then the guidance"
    )


def diversity_lost(history: History, config: WatchdogConfig) -> str | None:
    """Samples that have become alike."""
    shares = [check.diversity for check in history.finite()]
    if not shares or max(shares[-config.patience :]) >= config.least_diversity * min(1.0, max(shares)):
        return None
    return (
        f"the student's samples are alike, with {shares[-1]:.2g} of the data's diversity, most likely because it has "
        "fallen into one mode: lower its learning rate, or the weight of its adversarial term"
    )


def getting_worse(history: History, config: WatchdogConfig) -> str | None:
    """A Fréchet distance that stays far above its best."""
    distances = [check.distance for check in history.finite()]
    recent = distances[-config.patience :]
    if not recent or min(recent) <= config.distance_factor * min(distances) + DISTANCE_NOISE:
        return None
    return (
        f"the student gets worse: the distance of its latents to the data was {min(distances):.2g} and has been "
        f"{min(recent):.2g} or more in {len(recent)} checks running, most likely because its losses pull against each "
        "other: lower its learning rate, or stop here"
    )


def weights_grow(history: History, config: WatchdogConfig) -> str | None:
    """A norm of the weights that grows exponentially."""
    step, norm = history.weights[-1]
    earlier = next(value for when, value in history.weights if when >= step - WEIGHT_WINDOW)
    if not config.weight_growth * earlier < norm < math.inf:
        return None
    return (
        f"the norm of the student's weights grew from {earlier:.3g} to {norm:.3g} within {WEIGHT_WINDOW} iterations, "
        "most likely because its learning rate is too high: lower it"
    )


def discriminator_won(history: History, config: WatchdogConfig) -> str | None:
    """A discriminator that is always right, whose gradient teaches the student little."""
    for name, points in history.accuracy.items():
        begin = points[-1][0] - config.saturated_iterations
        mean = _mean([value for step, value in points if step >= begin])
        if points[0][0] <= begin and mean > config.saturated_accuracy:
            return (
                f"the discriminator has won ({name} {mean:.3f} over {config.saturated_iterations} iterations), so that "
                "the student learns little from it: lower discriminator_weight or the rate of its phase"
            )
    return None


def discriminator_weak(history: History, config: WatchdogConfig) -> str | None:
    """A discriminator that has not begun to learn; one that falls to chance later may have met its match."""
    for name, points in history.accuracy.items():
        end = points[0][0] + config.weak_iterations
        mean = _mean([value for step, value in points if step <= end])
        if points[-1][0] >= end and mean < config.weak_accuracy:
            return (
                f"the discriminator has learnt nothing yet ({name} {mean:.3f} in its first {config.weak_iterations} "
                "iterations), most likely because its weight is too small: raise discriminator_weight or its rate"
            )
    return None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


Detector = Callable[[History, WatchdogConfig], str | None]
COLLAPSES: dict[str, Detector] = {
    "not finite": not_finite,
    "weights grow": weights_grow,
    "mean drift": mean_drift,
    "deviation drift": deviation_drift,
    "diversity lost": diversity_lost,
    "getting worse": getting_worse,
}
"""Detectors of a student that is past saving: an earlier state and a lower rate may help."""
WARNINGS: dict[str, Detector] = {
    "discriminator won": discriminator_won,
    "discriminator weak": discriminator_weak,
}
"""Detectors of what a lower rate for all would not put right."""
