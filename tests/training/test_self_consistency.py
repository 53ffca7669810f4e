"""Parts of the consistency family, and what its methods share: fixed point, every prediction type, convergence."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.denoiser import Condition, Denoiser, DenoiserLike, GuidedDenoiser, levels
from fewstep.runtime.prediction import FROM_SAMPLE, TO_SAMPLE
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import EDM, VP, Flow, uniform_times
from fewstep.training.batches import ConditionedBatch
from fewstep.training.flow_matching import FlowMatchingConfig, flow_matching_phase
from fewstep.training.method import Copy, Task
from fewstep.training.methods import consistency, get_method, lcm, scott
from fewstep.training.phase import Draws
from fewstep.training.self_consistency import (
    Guidance,
    Networks,
    begin,
    boundary_scalings,
    consistency_function,
    draw_start,
    huber,
)
from fewstep.training.trainer import train

from .points import TRAINER, sample, seeded, sliced_distance

VARIANCE_PRESERVING = VP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


@pytest.mark.parametrize("prediction", [*TO_SAMPLE, "edm"])
def test_function_keeps_clean_samples_whatever_the_network_says(prediction: str) -> None:
    schedule = EDM() if prediction == "edm" else Flow()

    def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        return torch.sin(7 * x) + network_time[:, None]  # minus infinity for EDM

    x, t = torch.randn(6, 2), torch.tensor([0.0, 0.5, 0.0, 1e-3, 0.9, 0.0])
    result = consistency_function(Denoiser(network, schedule, prediction), x, t, {})
    assert torch.equal(result[t == 0], x[t == 0])
    assert not torch.equal(result[t > 0], x[t > 0])


def test_boundary_scalings_are_those_of_diffusers() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    for step in (0, 1, 20, 499, 999):
        reference = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(step)))
        ours = boundary_scalings(torch.tensor(step / 1000))
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)


def test_student_may_be_sampled_by_its_denoiser_alone(mixture: Any) -> None:
    """Where students are used, the boundary's terms are too small to be seen."""
    data = mixture()
    x, t = torch.randn(500, 2), torch.linspace(0.02, 1, 500)
    assert (consistency_function(data, x, t, {}) - data(x, t, {})).abs().max() < 1e-5


def test_distance_and_its_gradient() -> None:
    left = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    right = torch.randn(5, 2, dtype=torch.float64)
    difference = (left - right).detach()
    (gradient,) = torch.autograd.grad(huber(left, right, 0.3), left)
    torch.testing.assert_close(gradient, difference / (difference**2 + 0.09).sqrt() / 10)
    assert huber(right, right, 0.3) == 0
    torch.testing.assert_close(huber(left, right, 1e-9), difference.abs().mean())
    torch.testing.assert_close(huber(left, right, 1e4), (difference**2).mean() / 2e4, rtol=1e-4, atol=1e-12)


def test_times_are_neighbours_on_the_grid(gaussian: Any, point_task: Callable[..., Task]) -> None:
    data = gaussian(torch.zeros(2))
    task = point_task(data)
    networks, _ = begin(task, Guidance(task, 1.0), 0.95)
    batch = ConditionedBatch(torch.zeros(4000, 2), {})
    start = draw_start(networks, 50, batch, seeded())
    steps = (start.here.t * 50).round()
    assert set(steps.tolist()) == set(range(1, 51))
    torch.testing.assert_close(start.here.t, steps / 50)
    torch.testing.assert_close(start.there.t, (steps - 1) / 50)
    assert (start.there.t[steps == 1] == 0).all()
    noise = start.x_t / start.here.sigma  # of clean samples at 0
    torch.testing.assert_close(noise.var(), torch.tensor(1.0), rtol=0.05, atol=0)


def test_target_begins_as_the_student_and_is_averaged_by_the_trainer(gaussian: Any, point_task: Any) -> None:
    task = point_task(gaussian(torch.zeros(2)))
    networks, (average,) = begin(task, Guidance(task, 1.0), 0.95)
    assert (average.source, average.decay) == (networks.student.module, 0.95)
    assert average.module is not average.source
    for theirs, ours in zip(average.module.parameters(), average.source.parameters(), strict=True):
        assert torch.equal(theirs, ours)
        assert ours.requires_grad
        assert not theirs.requires_grad
    alone, none = begin(task, Guidance(task, 1.0), 0.0)
    assert none == []
    assert alone.target is alone.student.denoiser


def test_range_of_guidance_gives_each_sample_its_scale_and_tells_the_student(
    gaussian: Any, point_task: Callable[..., Task], point_batch: ConditionedBatch
) -> None:
    asked = []
    task = point_task(gaussian(torch.zeros(2)))

    def copies(name: str, embed_guidance: bool = False) -> Copy:
        asked.append((name, embed_guidance))
        return task.copy(name, embed_guidance)

    guidance = Guidance(task, 5.0, (3.0, 15.0))
    begin(replace(task, copy=copies), guidance, 0.95)
    assert asked == [("student", True), ("target", True)]
    teacher, condition = guidance(point_batch, seeded())
    scale = condition["guidance"]
    assert scale.shape == (32,)
    assert 3 <= scale.min() < 4
    assert 14 < scale.max() <= 15
    assert isinstance(teacher, GuidedDenoiser)
    assert teacher.scale is scale
    fixed, plain = Guidance(task, 5.0)(point_batch, seeded())
    assert isinstance(fixed, GuidedDenoiser)
    assert fixed.scale == 5
    assert plain is point_batch.condition


def test_scales_of_a_batch_guide_each_sample_alone(gaussian: Any) -> None:
    class Shifted:
        schedule = Flow()

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return gaussian(torch.zeros(2))(x_t, t, {}) + condition["shift"]

    x, t, scale = torch.randn(4, 2), torch.rand(4), torch.tensor([1.0, 2.0, 5.0, 0.0])
    negative, condition = {"shift": torch.full((1, 2), -1.0)}, {"shift": torch.randn(4, 2)}
    together = GuidedDenoiser(Shifted(), scale, negative)(x, t, condition)
    for row in range(4):
        one = {"shift": condition["shift"][row : row + 1]}
        alone = GuidedDenoiser(Shifted(), float(scale[row]), negative)(x[row : row + 1], t[row : row + 1], one)
        torch.testing.assert_close(together[row : row + 1], alone)


def lcm_loss(networks: Networks, batch: ConditionedBatch, draws: Draws) -> Tensor:
    return lcm.loss(networks, lcm.Config(solver_steps=6), batch, draws)[0]


def heun_loss(networks: Networks, batch: ConditionedBatch, draws: Draws) -> Tensor:
    return consistency.loss(networks, consistency.Config(points=6), batch, draws)[0]


def scott_loss(networks: Networks, batch: ConditionedBatch, draws: Draws) -> Tensor:
    """Without noise and without discriminator: what is left is the loop over substeps."""
    config = scott.Config(solver_steps=6, substeps=3, eta=0.0)
    start = draw_start(networks, config.solver_steps, batch, draws.own)
    schedule = networks.student.denoiser.schedule
    x_s = scott.stochastic_steps(start, config, schedule, batch.condition, draws.own)
    return scott.consistency_loss(networks, start, x_s, config.huber_width)[0]


LOSSES = [
    pytest.param(lcm_loss, "ddim", 1, id="lcm"),
    pytest.param(heun_loss, "heun", 1, id="consistency"),
    pytest.param(scott_loss, "ddim", 3, id="scott"),
]


def solving_student(teacher: DenoiserLike, sampler: str, substeps: int, offset: float = 0.0) -> Denoiser:
    """Runs the teacher's solver over what is left of the grid of 6 times, then adds `offset`."""

    def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        ends = []
        for row, time in zip(x, (network_time / 1000).tolist(), strict=True):
            steps = round(6 * time) * substeps
            times = [index / (6 * substeps) for index in range(steps, -1, -1)]
            if steps:
                row = get_sampler(sampler).function(teacher, row[None], times, {}, lambda k: x)[0]
            ends.append(row)
        return torch.stack(ends) + offset

    return Denoiser(network, Flow(), "sample")


@pytest.mark.parametrize(("loss", "sampler", "substeps"), LOSSES)
def test_the_teachers_solver_is_the_fixed_point(
    loss: Any, sampler: str, substeps: int, mixture: Any, point_task: Callable[..., Task], draws: Callable[..., Draws]
) -> None:
    """A student that already runs the solver to the end of the trajectory has loss 0; one beside it, its distance."""
    data = mixture(means=torch.tensor([[1.0, 0.6], [-1.0, 0.6]], dtype=torch.float64), weights=torch.tensor([0.7, 0.3]))
    task = point_task(data)
    batch = ConditionedBatch(data.sample(24, seeded()), {})
    guidance = Guidance(replace(task, teacher=data), 1.0)

    def value(student_offset: float, target_offset: float) -> float:
        student = solving_student(data, sampler, substeps, student_offset)
        target = solving_student(data, sampler, substeps, target_offset)
        networks = Networks(Copy(nn.Identity(), student, nn.Identity()), target, guidance)
        return float(loss(networks, batch, draws()))

    assert value(0, 0) < 1e-6
    assert value(0.5, 0) == pytest.approx(0.499, abs=1e-4)  # the boundary keeps clean samples from being moved


class PredictsSample:
    """A network that predicts `x_0`, under the conversions of another prediction type."""

    def __init__(self, network: Any, schedule: Any, prediction: str) -> None:
        self.network, self.schedule, self.prediction = network, schedule, prediction

    def __call__(self, x_t: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        t = network_time / 1000 if isinstance(self.schedule, Flow) else (network_time + 1) / 1000
        x_0 = self.network(x_t, t, condition)
        return FROM_SAMPLE[self.prediction](x_0, x_t, *levels(self.schedule, t, x_t))


@pytest.mark.parametrize("loss", [each.values[0] for each in LOSSES], ids=["lcm", "consistency", "scott"])
@pytest.mark.parametrize("schedule", [Flow(), VARIANCE_PRESERVING], ids=["flow", "vp"])
def test_neither_the_teachers_nor_the_students_prediction_type_matters(
    loss: Any, schedule: Any, mixture: Any, point_network: Any, point_task: Callable[..., Task], draws: Any
) -> None:
    """The same `x_0` gives the same loss and the same gradient, whichever way the networks put it."""
    data, network = mixture(schedule=schedule), point_network()
    task = point_task(data)
    batch = ConditionedBatch(data.sample(64, seeded()), {})

    def value_and_gradient(prediction: str) -> tuple[Tensor, Tensor]:
        teacher = Denoiser(PredictsSample(data, schedule, prediction), schedule, prediction)
        student = Denoiser(PredictsSample(network, schedule, prediction), schedule, prediction)
        guidance = Guidance(replace(task, teacher=teacher), 1.0)
        value = loss(Networks(Copy(network, student, network), student, guidance), batch, draws())
        gradients = torch.autograd.grad(value, list(network.parameters()))
        return value, torch.cat([gradient.flatten() for gradient in gradients])

    # A network that predicts noise says nothing of x_0 where alpha = 0, as it is at t = 1 of a flow.
    value, gradient = value_and_gradient("sample")
    assert value > 0.01
    for prediction in TO_SAMPLE:
        if prediction != "epsilon" or schedule is VARIANCE_PRESERVING:
            other, others = value_and_gradient(prediction)
            torch.testing.assert_close(other, value, rtol=1e-3, atol=0)
            torch.testing.assert_close(others, gradient, rtol=0, atol=1e-3 * float(gradient.abs().max()))


class Adapter(nn.Module):
    """A low-rank update of a frozen network's last layer; its first factor is random, its second zero."""

    def __init__(self, width: int, rank: int = 4) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, 2, bias=False)
        nn.init.zeros_(self.up.weight)


@pytest.mark.parametrize("name", ["lcm", "consistency", "scott"])
def test_adapters_on_a_frozen_teacher(
    name: str, mixture: Any, point_network: Any, point_task: Callable[..., Task], point_batch: Any, draws: Any
) -> None:
    base = point_network().requires_grad_(False)

    def copies(name: str, embed_guidance: bool = False) -> Copy:
        adapter = Adapter(64)

        def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
            features = base.trunk(torch.cat([x, network_time[:, None] / 1000 * torch.ones(3)], dim=1))
            return base.last(features) + adapter.up(adapter.down(features))

        return Copy(adapter, Denoiser(network, Flow(), "flow_prediction"), base)

    method = get_method(name)
    (stage,) = method.stages(replace(point_task(mixture()), copy=copies), method.Config())
    (average,) = stage.averages
    assert torch.equal(average.module.down.weight, stage.student.module.down.weight)
    loss, _ = stage.phases[-1].loss(point_batch, draws())
    loss.backward()
    assert bool(stage.student.module.up.weight.grad.any())
    assert all(parameter.grad is None for parameter in [*base.parameters(), *average.module.parameters()])


CONVERGENCE = [
    pytest.param("lcm", {"solver_steps": 25}, 0.13, id="lcm"),
    pytest.param("consistency", {"points": 18}, 0.13, id="consistency"),
    pytest.param("scott", {"solver_steps": 25, "discriminator_learning_rate": 5e-3}, 0.15, id="scott"),
]


@pytest.mark.parametrize(("name", "constants", "distance"), CONVERGENCE)
def test_student_learns_the_distribution_of_an_analytic_teacher(
    name: str,
    constants: dict[str, Any],
    distance: float,
    mixture: Any,
    point_network: Any,
    point_task: Callable[..., Task],
    tmp_path: Path,
) -> None:
    """Three modes of weights 0.5, 0.3, 0.2; the same student serves 1, 2 and 4 steps.

    For scale: DDIM on the exact teacher lies 0.70 from the data with 1 step, 0.33 with 2, 0.12 with 4 and 0.02 with
    50; two draws of 4,000 samples from the data lie 0.016 apart.
    """
    data = mixture()

    def batches(step: int, phase: int) -> ConditionedBatch:
        return ConditionedBatch(data.sample(256, seeded(1000 * step + phase)), {})

    base = point_network()
    teaching = flow_matching_phase(base, Denoiser(base, Flow(), "flow_prediction"), {}, FlowMatchingConfig(5e-3))
    train([teaching], batches, base, replace(TRAINER, iterations=300), tmp_path / "teacher")

    def copies(name: str, embed_guidance: bool = False) -> Copy:
        network = copy.deepcopy(base).requires_grad_(True)
        return Copy(network, Denoiser(network, Flow(), "flow_prediction"), network)

    method = get_method(name)
    constants = {"learning_rate": 5e-3, **constants}
    (stage,) = method.stages(replace(point_task(data), copy=copies), method.Config(**constants))

    def after(steps: int) -> float:
        samples = sample(stage.student.denoiser, stage.sampler, uniform_times(steps))
        return sliced_distance(samples, data.sample(4000, seeded(1)))

    before = after(1)
    student = stage.student.module
    train(stage.phases, batches, student, replace(TRAINER, iterations=500), tmp_path / "run", averages=stage.averages)
    assert before > 0.5
    assert max(after(1), after(2), after(4)) < distance
