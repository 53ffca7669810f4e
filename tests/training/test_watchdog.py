"""The watchdog: every collapse, brought about by training, is found; a healthy training is left in peace."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.runtime.denoiser import Condition, Denoiser
from fewstep.runtime.schedule import Flow
from fewstep.training.batches import ConditionedBatch
from fewstep.training.collapse import COLLAPSES, WatchdogConfig
from fewstep.training.flow_matching import FlowMatchingConfig, flow_matching_phase
from fewstep.training.latent_statistics import latent_statistics
from fewstep.training.method import Copy, Stage, Task
from fewstep.training.methods.dmd2 import Config, Networks, phases
from fewstep.training.phase import Draws, Loss, Phase
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig
from fewstep.training.watchdog import Watchdog, watch_stage

TRAINER = TrainerConfig(
    warmup=20, precision="no", weight_decay=0, ema_decay=0.99, decay=0.5, log_every=20, checkpoint_minutes=100
)
STRICT = WatchdogConfig(check_every=20, samples=128)
"""Tiny networks at high rates sway more than large ones, and here they are looked at ten times as often."""
SAMPLES_ONLY = replace(STRICT, weight_growth=math.inf)
"""For students of a few weights, which are multiplied by whatever they learn."""


def kinds(watch: Watchdog) -> set[str]:
    return {finding.kind for finding in watch.findings}


# DMD2 on a mixture of three modes.


@pytest.fixture
def dmd2(
    mixture: Any, point_networks: Callable[..., Networks], point_task: Callable[..., Task], tmp_path: Path
) -> Callable[..., tuple[Stage, Task]]:
    """A stage whose student has learnt the data's flow, but not yet to take few steps."""
    data = mixture()

    def batches(step: int, phase: int) -> ConditionedBatch:
        return ConditionedBatch(data.sample(128, torch.Generator().manual_seed(1000 * step + phase)), {})

    def make(steps: int = 1, rate: float = 1.0, **changes: Any) -> tuple[Stage, Task]:
        networks = point_networks(data, steps)
        student = networks.student
        flow = flow_matching_phase(student.module, student.denoiser, {}, FlowMatchingConfig(5e-3))
        train([flow], batches, student.module, replace(TRAINER, iterations=200, log_every=1000), tmp_path / "flow")
        networks.fake.module.load_state_dict(student.module.state_dict())
        config = Config(student_learning_rate=2e-3 * rate, fake_learning_rate=4e-3 * rate)
        trained = phases(networks, replace(config, **changes))
        task = replace(point_task(data, steps), batches=batches)
        return Stage("dmd2", student, trained, "consistency", networks.times, 1.0), task

    return make


def run(stage: Stage, task: Task, watch: Watchdog, iterations: int, rollback: bool = False) -> None:
    config = replace(TRAINER, iterations=iterations, rollback=rollback)
    train(stage.phases, task.batches, stage.student.module, config, task.folder / "run", watch=watch)


@pytest.mark.parametrize("steps", [1, 4])
def test_healthy_training_is_left_in_peace(steps: int, dmd2: Callable[..., tuple[Stage, Task]]) -> None:
    stage, task = dmd2(steps)
    watch = watch_stage(STRICT, stage, task)
    run(stage, task, watch, 300)
    assert watch.findings == []
    distances = [check["distance"] for check in watch.checks]
    assert len(distances) == 16
    assert min(distances) < distances[0] / 3
    assert watch.sound()


def test_rate_far_too_high_is_found_soon(dmd2: Callable[..., tuple[Stage, Task]], capsys: Any) -> None:
    stage, task = dmd2(rate=100)
    watch = watch_stage(STRICT, stage, task)
    run(stage, task, watch, 100)
    assert "weights grow" in kinds(watch)
    assert watch.findings[0].step <= 60
    assert not watch.sound()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "likely" in line]
    assert lines == [f"step {finding.step}: {finding.message}" for finding in watch.findings]
    assert all("lower" in line and ". " not in line for line in lines)  # one sentence that says what to do


def test_rolling_back_to_lower_rates_saves_the_student(dmd2: Callable[..., tuple[Stage, Task]]) -> None:
    stage, task = dmd2(rate=100)
    watch = watch_stage(STRICT, stage, task)
    run(stage, task, watch, 200, rollback=True)
    assert "weights grow" in kinds(watch)
    assert watch.sound()
    assert watch.checks[-1]["distance"] < 0.5


def test_student_ahead_of_the_network_that_teaches_it_drifts(dmd2: Callable[..., tuple[Stage, Task]]) -> None:
    """The fake score is never trained."""
    stage, task = dmd2()
    watch = watch_stage(STRICT, stage, task)
    run(replace(stage, phases=stage.phases[1:]), task, watch, 160)
    assert {"mean drift", "getting worse"} <= kinds(watch)
    assert not watch.sound()


def test_discriminator_that_always_wins(dmd2: Callable[..., tuple[Stage, Task]]) -> None:
    stage, task = dmd2(discriminator_weight=1.0, time_range=(0.02, 0.2))
    student = stage.student.network
    nn.init.constant_(student.get_parameter("last.bias"), 5)  # far from the data, and it stays there
    stage = replace(stage, phases=stage.phases[:1])
    watch = watch_stage(replace(STRICT, saturated_iterations=100), stage, task)
    run(stage, task, watch, 200, rollback=True)
    (finding,) = watch.findings
    assert (finding.kind, finding.collapse) == ("discriminator won", False)
    assert "fake/accuracy" in finding.message
    assert "lower discriminator_weight" in finding.message


def test_discriminator_that_never_learns(dmd2: Callable[..., tuple[Stage, Task]]) -> None:
    stage, task = dmd2(discriminator_weight=0.0)
    watch = watch_stage(replace(STRICT, weak_iterations=100), stage, task)
    run(stage, task, watch, 160, rollback=True)
    (finding,) = watch.findings
    assert (finding.kind, finding.collapse) == ("discriminator weak", False)
    assert "raise discriminator_weight" in finding.message


def test_discriminator_that_meets_its_match_is_no_news() -> None:
    """Accuracy falls to chance where the student has become as good as the data."""
    watch = linear_watch(nn.Linear(2, 2))
    for step in range(20, 6000, 20):
        watch(step, {"fake/accuracy": 0.9 if step < 1000 else 0.5, "student/loss": 1.0})
    assert watch.findings == []


# Linear students, which begin as the identity, are right at first and are then taught something wrong.

NOISE = torch.randn(256, 2, 8, 8, generator=torch.Generator().manual_seed(7))
CORRELATED = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))


class ChannelMixer(nn.Module):
    """`x + shift`, its channels mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(CORRELATED.clone())
        self.shift = nn.Parameter(torch.zeros(2, 8, 8))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("dc,bchw->bdhw", self.mix, self.gain * x) + self.shift


def linear_watch(module: nn.Module, config: WatchdogConfig = SAMPLES_ONLY) -> Watchdog:
    shape = (-1, 2) if isinstance(module, nn.Linear) else NOISE.shape
    noise = NOISE.reshape(shape)[:256]
    with torch.no_grad():
        real = latent_statistics(module(noise))
    watch = Watchdog(config, lambda: module(noise), real, module)
    watch.reset(0)
    return watch


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "another mean": (lambda x: x + 3, {"mean drift", "getting worse"}),
    "the mean of everything": (lambda x: 0 * x, {"deviation drift", "diversity lost", "getting worse"}),
    "contrast": (lambda x: 4 * x, {"deviation drift", "getting worse"}),
    "one picture": (lambda x: NOISE[:1].expand_as(x), {"diversity lost"}),
    "other colours": (lambda x: x * torch.tensor([1.0, -1.0]).reshape(2, 1, 1), {"getting worse"}),
}


@pytest.mark.parametrize("lesson", WRONG)
def test_student_that_is_taught_something_wrong(lesson: str, tmp_path: Path) -> None:
    wrong, expected = WRONG[lesson]
    student = ChannelMixer()
    right = ChannelMixer()

    def loss(batch: Tensor, draws: Draws) -> Loss:
        return functional.mse_loss(student(batch), wrong(right(batch)).detach()), {}

    def batches(step: int, phase: int) -> Tensor:
        return torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(step))

    watch = linear_watch(student)
    config = replace(TRAINER, iterations=300)
    train([Phase("student", student, loss, 0.02)], batches, student, config, tmp_path, watch=watch)
    assert kinds(watch) == expected
    assert all(finding.collapse for finding in watch.findings)


def test_weights_that_grow_behind_a_normalisation() -> None:
    """The samples show nothing of it."""
    linear = nn.Linear(2, 2, bias=False)
    module = nn.Sequential(nn.Unflatten(1, (1, 2)), linear, nn.Flatten(), nn.LayerNorm(2, elementwise_affine=False))
    noise = NOISE.reshape(-1, 2)[:256]
    real = latent_statistics(module(noise))
    watch = Watchdog(STRICT, lambda: module(noise), real, module)
    watch.reset(0)

    def grow(factor: float, steps: range) -> list[int]:
        found = []
        for step in steps:
            linear.weight.data *= factor ** (20 / 1000)
            if watch(step, {}):
                found.append(step)
        return found

    assert grow(2.5, range(20, 3020, 20)) == []
    assert len(grow(4, range(3020, 5020, 20))) == 1
    assert kinds(watch) == {"weights grow"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(value: float) -> None:
    student = ChannelMixer()
    watch = linear_watch(student)
    assert not watch(20, {})
    student.shift.data[0, 0, 0] = value
    assert not watch.sound()
    assert watch(25, {})  # at once, by the norm
    assert kinds(watch) == {"not finite"}
    assert watch.checks[-1]["finite"]
    assert not watch(40, {})  # told once
    assert not watch.checks[-1]["finite"]
    assert json.loads(json.dumps(watch.report(), allow_nan=False))["findings"][0]["kind"] == "not finite"


# Looks, rollbacks and reports.


def test_one_collapse_is_told_once_and_a_second_one_again() -> None:
    student = ChannelMixer()
    watch = linear_watch(student)
    healthy = {name: value.clone() for name, value in student.state_dict().items()}

    def points(steps: range) -> list[int]:
        return [step for step in steps if watch(step, {})]

    assert points(range(20, 200, 20)) == []
    student.shift.data += 3
    assert not watch.sound()
    assert points(range(200, 400, 20)) == [220]  # two looks running must agree
    student.load_state_dict(healthy)
    watch.reset(200)
    assert watch.checks[-1]["step"] == 200
    assert watch.sound()
    assert points(range(220, 500, 20)) == []
    student.shift.data += 3
    assert points(range(500, 700, 20)) == [520]
    watch.reset(500)  # to a checkpoint that was no better
    assert not watch.sound()
    assert points(range(520, 700, 20)) == [520]


def test_what_was_seen_survives_a_restart() -> None:
    """The best so far stays the measure, findings stay known, and what was told is not told again."""
    student = ChannelMixer()
    watch = linear_watch(student)
    watch(20, {"fake/accuracy": 0.7})
    student.shift.data += 3
    assert [watch(step, {}) for step in (40, 60)] == [False, True]
    state = json.loads(json.dumps(watch.state_dict(), allow_nan=False))
    again = Watchdog(SAMPLES_ONLY, watch.sample, watch.real, student)
    again.load_state_dict(state)
    assert again.state_dict() == watch.state_dict()
    assert again.report() == watch.report()
    assert not again.sound()
    assert not again(80, {})
    assert [finding.step for finding in again.findings] == [60] * len(watch.findings)


def test_resumed_training_is_held_against_its_best(dmd2: Callable[..., tuple[Stage, Task]]) -> None:
    stage, task = dmd2()
    first, second = watch_stage(STRICT, stage, task), watch_stage(STRICT, stage, task)
    run(stage, task, first, 100)
    run(stage, task, second, 140)
    assert second.checks[: len(first.checks)] == first.checks
    assert [check["step"] for check in second.checks] == list(range(0, 141, 20))


def test_a_moments_sway_is_no_collapse() -> None:
    student = ChannelMixer()
    watch = linear_watch(student)
    for step in range(20, 400, 20):
        student.shift.data.fill_(3 if step % 60 == 0 else 0)
        assert not watch(step, {})
    assert watch.findings == []


def test_looks_are_as_rare_as_asked() -> None:
    """Whatever the distance of log points."""
    student = ChannelMixer()
    watch = linear_watch(student, replace(STRICT, check_every=100))
    for step in range(30, 630, 30):
        watch(step, {})
    assert [check["step"] for check in watch.checks] == [0, 120, 210, 300, 420, 510, 600]


def test_samples_are_fixed_and_take_no_random_numbers(
    point_networks: Callable[..., Networks], point_task: Callable[..., Task]
) -> None:
    networks = point_networks(None, 4)
    stage = Stage("dmd2", networks.student, [], "consistency", networks.times, 1.0)
    state = torch.get_rng_state()
    watch = watch_stage(replace(STRICT, samples=80), stage, point_task(networks.teacher, 4))
    first = watch.sample()
    assert first.shape == (96, 2)  # whole batches of 32
    assert torch.equal(first, watch.sample())
    assert len(first.unique(dim=0)) == 96
    assert torch.equal(state, torch.get_rng_state())


def test_student_with_an_input_for_guidance_is_given_it(point_task: Callable[..., Task]) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, network_time: Tensor | None = None, condition: Condition | None = None) -> Tensor:
            assert condition
            return super().forward(x) * condition["guidance"][:, None]

    network = Scaled(2, 2)
    denoiser = Denoiser(network, Flow(), "flow_prediction")
    student = Copy(network, denoiser, network)
    stage = Stage("lcm", student, [], "consistency", (1.0, 0.0), 3.0, (1.0, 5.0))
    samples = watch_stage(STRICT, stage, point_task(denoiser)).sample()
    other = watch_stage(STRICT, replace(stage, guidance=4.0), point_task(denoiser)).sample()
    assert not torch.equal(samples, other)


def test_every_collapse_is_provoked_above() -> None:
    assert set(COLLAPSES) == {kind for _, expected in WRONG.values() for kind in expected} | {
        "weights grow",
        "not finite",
    }
