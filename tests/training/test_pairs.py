"""Cached pairs: what they hold, that they are made once, and that an interrupted making goes on."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, DenoiserLike
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.schedule import EDM, Flow, Schedule, Trig
from fewstep.training.batches import ConditionedBatch
from fewstep.training.method import Task
from fewstep.training.pairs import PairsConfig, make_pairs
from fewstep.training.phase import Draws

from .points import InFloat32, seeded

MEAN = torch.tensor([0.5, -0.3])
SMALL = PairsConfig(count=96, sampler="heun", solver_steps=4)  # three chunks of the fixture's 32


@dataclass
class Counted:
    """A teacher that counts its calls and breaks after `most` of them."""

    teacher: DenoiserLike
    most: float = float("inf")
    calls: int = 0
    schedule: Schedule = field(default_factory=Flow)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        if self.calls > self.most:
            raise KeyboardInterrupt
        return self.teacher(x_t, t, condition)


@pytest.fixture
def task(point_task: Callable[..., Task], gaussian: Any) -> Task:
    def batches(step: int, phase: int) -> ConditionedBatch:
        generator = seeded(100 * step + phase)
        return ConditionedBatch(torch.randn(32, 2, generator=generator), {"tag": torch.full((32,), step)})

    return replace(point_task(gaussian(MEAN)), batches=batches)


@pytest.mark.parametrize("schedule", [Flow(), EDM(sigma_max=20), Trig()], ids=["flow", "edm", "trig"])
def test_pairs_are_the_teachers_trajectories(schedule: Schedule, task: Task, gaussian: Any) -> None:
    teacher, times = gaussian(MEAN, schedule=schedule), (1.0, 0.6, 0.0)
    pairs = make_pairs(task, InFloat32(teacher), "test", replace(SMALL, solver_steps=160), times)
    batch = pairs.chunk(1)
    x_T = batch.path[0]
    assert batch.path.shape == (3, 32, 2)
    for time, x_t in zip(times[1:], batch.path[1:], strict=True):
        exact = teacher.flow(x_T, torch.tensor(1.0), torch.tensor(time))
        torch.testing.assert_close(x_t, exact, rtol=0, atol=0.01)
    assert not torch.equal(x_T, pairs.chunk(0).path[0])


def test_every_chunk_has_the_condition_it_was_made_with(task: Task, draws: Callable[[int], Draws]) -> None:
    seen: dict[int, Tensor] = {}

    class Marked:
        schedule = Flow()

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return condition["tag"][:, None].expand_as(x_t).float()

    pairs = make_pairs(task, Marked(), "test", SMALL)
    for seed in range(20):
        batch = pairs.draw(draws(seed))
        seen[int(batch.condition["tag"][0])] = batch.path[-1]
    assert set(seen) == {0, 1, 2}
    for tag, x_0 in seen.items():
        torch.testing.assert_close(x_0, torch.full_like(x_0, tag))


def test_same_draws_give_the_same_pairs(task: Task, draws: Callable[[int], Draws]) -> None:
    pairs = make_pairs(task, task.teacher, "test", SMALL)
    assert torch.equal(pairs.draw(draws(3)).path, pairs.draw(draws(3)).path)


def test_pairs_are_made_once_and_more_of_them_go_on(task: Task) -> None:
    first = Counted(task.teacher)
    made = make_pairs(task, first, "test", SMALL)
    again = Counted(task.teacher)
    make_pairs(task, again, "test", SMALL)
    assert again.calls == 1  # the check that it is the same teacher
    more = Counted(task.teacher)
    assert make_pairs(task, more, "test", replace(SMALL, count=97)).chunks == 4
    assert (more.calls - 1) * 3 == first.calls - 1
    assert made.chunks == 3


def test_interrupted_making_goes_on(task: Task) -> None:
    whole = make_pairs(replace(task, folder=task.folder / "whole"), task.teacher, "test", SMALL)
    broken = Counted(task.teacher, most=10)  # within the second chunk: each takes 7 calls
    with pytest.raises(KeyboardInterrupt):
        make_pairs(task, broken, "test", SMALL)
    rest = Counted(task.teacher)
    pairs = make_pairs(task, rest, "test", SMALL)
    assert rest.calls == 1 + 2 * 7
    for number in range(3):
        assert torch.equal(pairs.chunk(number).path, whole.chunk(number).path)
    assert not list(pairs.folder.glob("*.part"))


def test_processes_begin_at_different_chunks(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KeyboardInterrupt):
        make_pairs(task, Counted(task.teacher, most=1 + 7 + 1), "test", SMALL)
    assert [file.stem for file in sorted(next((task.folder / "pairs").iterdir()).glob("0*"))] == ["000001"]


@pytest.mark.parametrize("change", [{"solver_steps": 5}, {"sampler": "ddim"}])
def test_other_solvers_give_other_pairs(change: dict[str, Any], task: Task) -> None:
    folders = {make_pairs(task, task.teacher, "test", config).folder for config in (SMALL, replace(SMALL, **change))}
    assert len(folders) == 2


def test_pairs_of_another_teacher_are_refused(task: Task, gaussian: Any) -> None:
    pairs = make_pairs(task, task.teacher, "test", SMALL)
    refusal = f"the pairs in {re.escape(str(pairs.folder))} are of another teacher: remove them, or give another --out"
    with pytest.raises(FewstepError, match=refusal):
        make_pairs(task, gaussian(MEAN + 0.1), "test", SMALL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_teachers_without_finite_samples_are_refused(value: float, task: Task) -> None:
    """At once, not by the trainer's advice to lower the learning rate; and nothing of it is kept."""

    class Broken:
        schedule = Flow()

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return torch.where(t < 0.4, value, task.teacher(x_t, t, condition))

    with pytest.raises(FewstepError, match=r"gave NaN or infinity for a pair \(4 steps of heun\)"):
        make_pairs(task, Broken(), "test", SMALL)
    assert not list((task.folder / "pairs").rglob("0*.safetensors"))


def test_rounding_of_other_hardware_is_the_same_teacher(task: Task) -> None:
    class Rounded:
        schedule = Flow()

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return task.teacher(x_t, t, condition).bfloat16().float()

    pairs = make_pairs(task, task.teacher, "test", SMALL)
    assert make_pairs(task, Rounded(), "test", SMALL) == pairs


def test_samplers_that_draw_noise_are_refused(task: Task) -> None:
    with pytest.raises(FewstepError, match="draws no noise, not consistency: choose from ddim, euler, heun"):
        make_pairs(task, task.teacher, "test", replace(SMALL, sampler="consistency"))
