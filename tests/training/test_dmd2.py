"""DMD2: its identity, who learns from what, and that it carries an analytic teacher into a few steps."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.samplers import get_sampler
from fewstep.training.batches import ConditionedBatch
from fewstep.training.flow_matching import FlowMatchingConfig, flow_matching_phase
from fewstep.training.method import Task
from fewstep.training.methods.dmd2 import Config, Networks, fake_loss, phases, student_loss
from fewstep.training.phase import Draws
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig

from .points import seeded, sliced_distance

PLAIN = Config(generator_weight=0, discriminator_weight=0)
TRAINER = TrainerConfig(iterations=1, warmup=1, precision="no", weight_decay=0)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def any_nonzero(tensors: Iterable[Tensor]) -> bool:
    return any(bool(tensor.any()) for tensor in tensors)


def test_student_stands_still_where_the_fake_score_is_the_teacher(
    point_networks: Callable[..., Networks], point_batch: ConditionedBatch, draws: Callable[..., Draws]
) -> None:
    networks = point_networks(None)
    loss, _ = student_loss(networks, PLAIN, point_batch, draws())
    assert not any_nonzero(gradients(loss, networks.student.module))
    other = replace(networks, teacher=point_networks(None).teacher)
    loss, _ = student_loss(other, PLAIN, point_batch, draws())
    assert any_nonzero(gradients(loss, networks.student.module))


def test_adversarial_term_alone_moves_the_student(
    point_networks: Callable[..., Networks], point_batch: ConditionedBatch, draws: Callable[..., Draws]
) -> None:
    """With equal scores its gradient is what is left, in proportion to its weight."""
    networks = point_networks(None)

    def gradient(weight: float) -> list[Tensor]:
        config = replace(PLAIN, generator_weight=weight)
        return gradients(student_loss(networks, config, point_batch, draws())[0], networks.student.module)

    once, twice = gradient(0.1), gradient(0.2)
    assert any_nonzero(once)
    torch.testing.assert_close([2 * value for value in once], twice)


def test_matching_term_sends_nothing_through_the_two_scores(
    point_networks: Callable[..., Networks], point_batch: ConditionedBatch, draws: Callable[..., Draws]
) -> None:
    networks = point_networks(point_networks(None).teacher)
    _, parts = student_loss(networks, PLAIN, point_batch, draws())
    assert any_nonzero(gradients(parts["matching"], networks.student.module))
    assert not any_nonzero(gradients(parts["matching"], networks.fake.module))
    assert not any_nonzero(gradients(parts["matching"], networks.head))


@pytest.mark.parametrize("phase", ["fake", "student"])
def test_phase_changes_its_own_networks_only(
    phase: str, point_networks: Callable[..., Networks], point_batch: ConditionedBatch, tmp_path: Path
) -> None:
    teacher = point_networks(None)
    networks = point_networks(teacher.teacher)
    modules = {
        "student": networks.student.module,
        "fake": networks.fake.module,
        "head": networks.head,
        "teacher": teacher.fake.module,
    }
    before = {name: parameters(module) for name, module in modules.items()}
    chosen = [each for each in phases(networks, replace(PLAIN, discriminator_weight=1)) if each.name == phase]
    train(chosen, lambda step, index: point_batch, networks.student.module, TRAINER, tmp_path)
    changed = {name for name, module in modules.items() if not torch.equal(parameters(module), before[name])}
    assert changed == ({"fake", "head"} if phase == "fake" else {"student"})


def parameters(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def test_fake_score_is_trained_on_student_samples_and_the_discriminator_on_both(
    point_networks: Callable[..., Networks], point_batch: ConditionedBatch, draws: Callable[..., Draws]
) -> None:
    networks = point_networks(None)
    config = replace(PLAIN, discriminator_weight=1.0)
    _, parts = fake_loss(networks, config, point_batch, draws())
    _, others = fake_loss(networks, config, replace(point_batch, x_0=point_batch.x_0 + 1), draws())
    assert torch.equal(parts["denoising"], others["denoising"])  # real data plays no part in it
    assert not torch.equal(parts["adversarial"], others["adversarial"])
    assert not any_nonzero(gradients(parts["denoising"], networks.head))
    # The discriminator reads the trunk: nothing of it reaches the layers behind.
    assert any_nonzero(gradients(parts["adversarial"], networks.head))
    assert any_nonzero(gradients(parts["adversarial"], networks.feature_block))
    assert not any_nonzero(gradients(parts["adversarial"], networks.fake.network.last))
    assert not any_nonzero(gradients(parts["denoising"] + parts["adversarial"], networks.student.module))


def test_two_time_scales(point_networks: Callable[..., Networks]) -> None:
    fake, student = phases(point_networks(None), replace(PLAIN, student_every=7))
    assert (fake.name, fake.every, student.name, student.every) == ("fake", 1, "student", 7)


def test_teacher_is_guided_only_when_asked(point_task: Callable[..., Task], point_networks: Any) -> None:
    task = point_task(point_networks(None).teacher)
    assert task.guided(1) is task.teacher
    x, t = torch.randn(5, 2), torch.rand(5)
    # Without a condition there is nothing to guide by.
    torch.testing.assert_close(task.guided(3)(x, t, {}), task.teacher(x, t, {}))


@pytest.mark.parametrize(("steps", "every", "iterations"), [(1, 2, 600), (4, 5, 1000)])
def test_student_learns_the_distribution_of_an_analytic_teacher(
    steps: int,
    every: int,
    iterations: int,
    mixture: Any,
    point_networks: Callable[..., Networks],
    tmp_path: Path,
) -> None:
    """Three modes of weights 0.5, 0.3, 0.2: a coarse flow smears them, the distilled student puts each in its place.

    For scale: two draws of 4,000 samples from the data itself lie 0.016 apart.
    """
    data = mixture()
    networks = point_networks(data, steps)
    config = replace(TRAINER, warmup=20, ema_decay=0.99, decay=0.5, log_every=1000, checkpoint_minutes=100)

    def batches(step: int, phase: int) -> ConditionedBatch:
        return ConditionedBatch(data.sample(256, seeded(1000 * step + phase)), {})

    def samples() -> Tensor:
        noise = torch.randn(steps, 4000, 2, generator=seeded(5))
        with torch.no_grad():
            return get_sampler("consistency").function(
                networks.student.denoiser, noise[0], networks.times, {}, lambda k: noise[k]
            )

    teaching = flow_matching_phase(networks.student.module, networks.student.denoiser, {}, FlowMatchingConfig(5e-3))
    train([teaching], batches, networks.student.module, replace(config, iterations=400), tmp_path / "teacher")
    networks.fake.module.load_state_dict(networks.student.module.state_dict())
    before = sliced_distance(samples(), data.sample(4000, seeded(1)))

    method = Config(student_every=every, student_learning_rate=2e-3, fake_learning_rate=4e-3)
    train(
        phases(networks, method),
        batches,
        networks.student.module,
        replace(config, iterations=iterations),
        tmp_path / "student",
    )
    after = sliced_distance(samples(), data.sample(4000, seeded(1)))
    assert after < 0.14
    assert after < before / 2
    nearest = torch.cdist(samples(), data.means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(nearest)
    torch.testing.assert_close(shares, data.weights, rtol=0, atol=0.1)
