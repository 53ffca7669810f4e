"""SCott: LCM without noise and discriminator, a solver that keeps the process's laws, and who learns from what."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.samplers.grid import level
from fewstep.runtime.schedule import VP, Flow
from fewstep.training.batches import ConditionedBatch
from fewstep.training.discriminator import make_discriminator
from fewstep.training.method import Task
from fewstep.training.methods import lcm
from fewstep.training.methods.scott import Config, judge_loss, phases, stages, stochastic_steps, student_loss
from fewstep.training.phase import Draws
from fewstep.training.self_consistency import Guidance, Start, begin
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig

PLAIN = Config(eta=0.0, substeps=1, generator_weight=0.0)
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def any_nonzero(loss: Tensor, module: nn.Module) -> bool:
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


@pytest.mark.parametrize("guidance_range", [None, (3.0, 15.0)])
def test_without_noise_substeps_and_discriminator_it_is_lcm(
    guidance_range: Any, mixture: Any, point_task: Callable[..., Task], draws: Callable[..., Draws]
) -> None:
    """Exactly, in value and gradient."""
    data = mixture()
    task = point_task(data)
    networks, _ = begin(task, Guidance(task, 1.0, guidance_range), 0.95)
    batch = ConditionedBatch(data.sample(64), {})
    student = list(networks.student.module.parameters())
    ours, _ = student_loss(networks, make_discriminator(task), PLAIN, batch, draws())
    theirs, _ = lcm.loss(networks, lcm.Config(), batch, draws())
    assert torch.equal(ours, theirs)
    for left, right in zip(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student), strict=True):
        assert torch.equal(left, right)


def solve(data: Any, x_t: Tensor, t: float, s: float, config: Config) -> Tensor:
    here, there = (level(data.schedule, torch.full((len(x_t),), time, dtype=x_t.dtype), x_t) for time in (t, s))
    generator = torch.Generator().manual_seed(3)
    return stochastic_steps(Start(x_t, here, there, data, {}), config, data.schedule, {}, generator)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_substeps_do_not_change_the_law_of_a_known_end(eta: float, gaussian: Any) -> None:
    """Where `x_0` is certain a step is exact: it keeps `e^{-eta h}` of the noise, in one substep or in four."""
    data = gaussian(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.0)
    t, s = 0.7, 0.5
    eps = torch.tensor([1.0, -0.5], dtype=torch.float64)
    x_t = ((1 - t) * data.mean + t * eps).expand(40_000, 2)
    kept = ((1 - t) * s / ((1 - s) * t)) ** eta
    for substeps in (1, 4):
        x_s = solve(data, x_t, t, s, Config(substeps=substeps, eta=eta))
        torch.testing.assert_close(x_s.mean(0), (1 - s) * data.mean + s * kept * eps, rtol=0, atol=0.01)
        torch.testing.assert_close(
            x_s.std(0), torch.full((2,), s * (1 - kept**2) ** 0.5).double(), rtol=0.02, atol=1e-9
        )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_noise_of_any_strength_keeps_the_marginals(eta: float, schedule: str, gaussian: Any) -> None:
    """Real samples noised to t arrive at s as if noised there."""
    data = gaussian(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.3)
    if schedule == "vp":
        data = replace(data, schedule=VP(torch.cumprod(1 - BETAS, 0)))
    t, s = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    alpha_t, sigma_t, alpha_s, sigma_s = (
        data.schedule.alpha(t),
        data.schedule.sigma(t),
        data.schedule.alpha(s),
        data.schedule.sigma(s),
    )
    x_0 = data.sample(40_000)
    x_t = alpha_t * x_0 + sigma_t * torch.randn(x_0.shape, dtype=torch.float64)
    x_s = solve(data, x_t, 0.7, 0.6, Config(substeps=16, eta=eta))
    torch.testing.assert_close(x_s.mean(0), alpha_s * data.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x_s.var(0), (0.3 * alpha_s**2 + sigma_s**2).expand(2), rtol=0.03, atol=0)


def test_steps_may_begin_in_pure_noise_and_end_clean(mixture: Any) -> None:
    data = mixture()
    x_1 = torch.randn(200, 2)
    for eta in (0.0, 0.01, 1.0):
        assert torch.isfinite(solve(data, x_1, 1.0, 0.5, Config(eta=eta))).all()
        clean = solve(data, x_1, 0.02, 0.0, Config(substeps=1, eta=eta))
        torch.testing.assert_close(clean, data(x_1, torch.tensor(0.02), {}))


def correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


@pytest.mark.parametrize("schedule", [Flow(), VP(torch.cumprod(1 - BETAS, 0))], ids=["flow", "vp"])
def test_a_little_noise_leaves_the_start_of_one_step_students_where_it_was(schedule: Any, mixture: Any) -> None:
    """At t = 1 a flow holds no data and a step in log-SNR is infinite; still the path goes on from its own noise."""
    data, x_1 = mixture(schedule=schedule), torch.randn(4000, 2, dtype=torch.float64)
    for eta, least in ((0.0, 0.999), (0.01, 0.98), (0.1, 0.8)):
        assert correlation(solve(data, x_1, 1.0, 0.98, Config(eta=eta)), x_1) > least
    assert correlation(solve(data, x_1, 1.0, 0.98, Config(eta=10.0, substeps=8)), x_1) < 0.9


@pytest.mark.parametrize("eta", [0.01, 0.3, 1.0])
def test_share_of_fresh_noise_has_no_jump_at_pure_noise(eta: float, mixture: Any) -> None:
    x_t = torch.randn(500, 2, dtype=torch.float64)
    at_1, near, nearer = (solve(mixture(), x_t, t, 0.9, Config(eta=eta)) for t in (1.0, 1 - 1e-6, 1 - 1e-9))
    torch.testing.assert_close(near, at_1, rtol=0, atol=1e-4)
    torch.testing.assert_close(nearer, at_1, rtol=0, atol=1e-7)


def test_adversarial_gradient_is_in_proportion_to_its_weight(
    mixture: Any, point_task: Callable[..., Task], point_batch: ConditionedBatch, draws: Callable[..., Draws]
) -> None:
    task = point_task(mixture())
    networks, _ = begin(task, Guidance(task, 1.0), 0.95)
    judge = make_discriminator(task)

    def gradient(weight: float) -> Tensor:
        loss, _ = student_loss(networks, judge, replace(PLAIN, generator_weight=weight), point_batch, draws())
        found = torch.autograd.grad(loss, list(networks.student.module.parameters()))
        return torch.cat([each.flatten() for each in found])

    none, once, twice = gradient(0.0), gradient(0.5), gradient(1.0)
    assert bool((once - none).any())
    torch.testing.assert_close(twice - none, 2 * (once - none), rtol=1e-3, atol=1e-6)


def test_discriminator_learns_from_real_samples_and_moves_nothing_else(
    mixture: Any, point_task: Callable[..., Task], point_batch: ConditionedBatch, draws: Callable[..., Draws]
) -> None:
    task = point_task(mixture())
    networks, _ = begin(task, Guidance(task, 1.0), 0.95)
    judge = make_discriminator(task)
    loss, _ = judge_loss(networks, judge, Config(), point_batch, draws())
    assert any_nonzero(loss, judge.head)
    assert any_nonzero(loss, judge.backbone.module)
    assert not any_nonzero(loss, networks.student.module)
    moved, _ = judge_loss(networks, judge, Config(), replace(point_batch, x_0=point_batch.x_0 + 1), draws())
    assert not torch.equal(loss, moved)


@pytest.mark.parametrize("name", ["discriminator", "student"])
def test_phase_changes_its_own_networks_only(
    name: str, mixture: Any, point_task: Callable[..., Task], point_batch: ConditionedBatch, tmp_path: Path
) -> None:
    task = point_task(mixture())
    networks, (average,) = begin(task, Guidance(task, 1.0), 0.95)
    judge = make_discriminator(task)
    modules = {
        "student": networks.student.module,
        "target": average.module,
        "backbone": judge.backbone.module,
        "head": judge.head,
    }
    before = {key: nn.utils.parameters_to_vector(module.parameters()).clone() for key, module in modules.items()}
    chosen = [each for each in phases(networks, judge, Config()) if each.name == name]
    trainer = TrainerConfig(iterations=1, warmup=1, precision="no", weight_decay=0)
    train(chosen, lambda *_: point_batch, networks.student.module, trainer, tmp_path, averages=[average])
    after = {key: nn.utils.parameters_to_vector(module.parameters()) for key, module in modules.items()}
    changed = {key for key in modules if not torch.equal(before[key], after[key])}
    assert changed == ({"backbone", "head"} if name == "discriminator" else {"student", "target"})


def test_stage_says_how_to_sample(gaussian: Any, point_task: Callable[..., Task]) -> None:
    task = replace(point_task(gaussian(torch.zeros(2)), steps=2), guidance=4.0)
    (stage,) = stages(task, Config(guidance_range=(1.0, 8.0)))
    assert (stage.sampler, stage.times) == ("consistency", (1.0, 0.5, 0.0))
    assert (stage.guidance, stage.guidance_range) == (4.0, (1.0, 8.0))
    assert [phase.name for phase in stage.phases] == ["discriminator", "student"]
