"""Watches a student's training for collapse, the field's commonest complaint, and says what the likely cause is.

At every log point it reads the logged scalars and the norm of the weights; every few hundred iterations it draws the
student's samples at fixed noise and conditions and compares them with the real latents; `collapse.py` judges.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import get_console
from torch import Tensor, nn

from .batches import ConditionedBatch
from .collapse import COLLAPSES, WARNINGS, Detector, History, WatchdogConfig
from .fixed_noise import sample_at_fixed_noise
from .latent_statistics import Comparison, LatentStatistics, compare, latent_statistics
from .method import Stage, Task


@dataclass(frozen=True)
class Finding:
    """Something the watchdog has seen.

    Args:
        step: at which.
        kind: a key of `COLLAPSES` or `WARNINGS`.
        collapse: whether only an earlier state of the student can be used.
        message: one sentence with the likely cause and what to do.
    """

    step: int
    kind: str
    collapse: bool
    message: str


class Watchdog:
    """Called by the trainer at every log point, after `reset` or `load_state_dict`; `findings` holds what it found.

    Args:
        config: thresholds.
        sample: draws the student's `x_0` (N, C, ...), the same in every call while the student is the same.
        real: statistics of real latents (N, C, ...), of the same conditions if there are any.
        module: the student's weights.
    """

    def __init__(
        self, config: WatchdogConfig, sample: Callable[[], Tensor], real: LatentStatistics, module: nn.Module
    ) -> None:
        self.config, self.sample, self.real, self.module = config, sample, real, module
        self.findings: list[Finding] = []
        self.checks: list[dict[str, Any]] = []
        self._step, self._history = 0, History()
        self._reported: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Look at the training after `step` iterations, and print what is new.

        Args:
            step: iterations done.
            metrics: the logged scalars; those whose names end in `accuracy` are discriminators'.

        Returns:
            Whether the student has just collapsed; each kind of collapse is told once until `reset`.
        """
        due = step // self.config.check_every != self._step // self.config.check_every
        self._step = step
        self._history.weights.append((step, weight_norm(self.module)))
        for name, value in metrics.items():
            if name.endswith("accuracy"):
                self._history.accuracy.setdefault(name, []).append((step, value))
        if due:
            self._check()
        found = [*self._find(COLLAPSES, True), *self._find(WARNINGS, False)]
        for finding in found:
            self._report(finding)
        return any(finding.collapse for finding in found)

    def reset(self, step: int) -> None:
        """Begin, or begin anew, with the weights as they are now, those of `step`.

        What the student was at its best stays the measure.
        """
        checks: list[Comparison | None] = [*self._history.finite()]
        self._step, self._reported = step, set()
        self._history = History(
            checks[: max(1, len(checks) - self.config.patience)], [(step, weight_norm(self.module))]
        )
        self._check()

    def sound(self) -> bool:
        """Whether the student as it is now shows no sign of collapse: only then is it worth going back to."""
        checks = [*self._history.checks, self._compare()]
        weights = [*self._history.weights, (self._step, weight_norm(self.module))]
        now, at_once = replace(self._history, checks=checks, weights=weights), replace(self.config, patience=1)
        return not any(detect(now, at_once) for detect in COLLAPSES.values())

    def report(self) -> dict[str, Any]:
        """Findings and checks so far, ready for JSON."""
        return {"findings": [asdict(finding) for finding in self.findings], "checks": self.checks}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON."""
        return {
            **self.report(),
            "step": self._step,
            "reported": sorted(self._reported),
            "history": asdict(self._history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._step, self._reported, history = state["step"], set(state["reported"]), state["history"]
        self.findings = [Finding(**each) for each in state["findings"]]
        self.checks = [*state["checks"]]
        self._history = History(
            [each and Comparison(**each) for each in history["checks"]],
            [(step, norm) for step, norm in history["weights"]],
            {name: [(step, value) for step, value in points] for name, points in history["accuracy"].items()},
        )

    def _check(self) -> None:
        check = self._compare()
        self._history.checks.append(check)
        self.checks.append({"step": self._step, "finite": check is not None} | (asdict(check) if check else {}))

    def _compare(self) -> Comparison | None:
        with torch.no_grad():
            samples = self.sample()
        return compare(latent_statistics(samples), self.real) if bool(samples.isfinite().all()) else None

    def _find(self, detectors: Mapping[str, Detector], collapse: bool) -> Iterator[Finding]:
        for kind, detect in detectors.items():
            message = None if kind in self._reported else detect(self._history, self.config)
            if message:
                yield Finding(self._step, kind, collapse, message)

    def _report(self, finding: Finding) -> None:
        self._reported.add(finding.kind)
        self.findings.append(finding)
        line = f"step {finding.step}: {finding.message}"
        get_console().print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def watch_stage(config: WatchdogConfig, stage: Stage, task: Task) -> Watchdog:
    """Watch a stage's student on the first real latents of the data and their conditions, a batch at a time."""
    batches = [task.batches(0, 0)]
    while sum(len(batch.x_0) for batch in batches) < config.samples:
        batches.append(task.batches(len(batches), 0))
    real = latent_statistics(torch.cat([batch.x_0 for batch in batches]))

    def sample() -> Tensor:
        return torch.cat([sample_student(stage, batch, number) for number, batch in enumerate(batches)])

    return Watchdog(config, sample, real, stage.student.module)


def sample_student(stage: Stage, batch: ConditionedBatch, number: int) -> Tensor:
    """The student's `x_0` (B, C, ...) for a batch's conditions, at noise that depends on the batch's number only."""
    count, shape = len(batch.x_0), batch.x_0.shape[1:]
    seeds = range(number * count, (number + 1) * count)
    return sample_at_fixed_noise(
        stage.student.denoiser,
        stage.sampler,
        stage.times,
        batch.condition,
        seeds,
        shape,
        batch.x_0.device,
        stage.guidance if stage.guidance_range else None,
    )


@torch.no_grad()
def weight_norm(module: nn.Module) -> float:
    """Euclidean norm of all parameters."""
    return float(nn.utils.get_total_norm(list(module.parameters())))
