"""The training loop: resuming, averages, the learning rate, budgets and what it refuses."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fewstep.runtime.errors import FewstepError
from fewstep.training.trainer import Loss, Phase, TrainerConfig, read_curve, step_generator, train, training_device

CONFIG = TrainerConfig(iterations=12, seed=3, warmup=4, precision="no", checkpoint_minutes=0, log_every=1)
Batches = Callable[[int, int], Tensor]


def batches(step: int, phase: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + phase))


def stop_at(step: int, source: Batches = batches) -> Batches:
    """Batches that end in Ctrl-C."""

    def interrupted(current: int, phase: int) -> Tensor:
        if current == step:
            raise KeyboardInterrupt
        return source(current, phase)

    return interrupted


def two_phases(seed: int = 0) -> tuple[list[Phase[Tensor]], nn.Module]:
    """A student that follows a critic, the critic follows the data; the student runs every other time."""
    torch.manual_seed(seed)
    student, critic = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def critic_loss(batch: Tensor, generator: torch.Generator) -> Loss:
        noise = torch.randn(batch.shape, generator=generator)
        return (critic(batch + noise) - batch).pow(2).mean(), {}

    def student_loss(batch: Tensor, generator: torch.Generator) -> Loss:
        noise = torch.randn(batch.shape, generator=generator)
        value = (critic(student(noise)) - batch).pow(2).mean()
        return value, {"twice": 2 * value}

    return [Phase("critic", critic, critic_loss, 1e-2), Phase("student", student, student_loss, 3e-3, every=2)], student


def linear_phase(
    loss: Callable[[Tensor], Tensor] | None = None, **fields: Any
) -> tuple[list[Phase[Tensor]], nn.Linear]:
    module = nn.Linear(3, 1)

    def default(batch: Tensor, generator: torch.Generator) -> Loss:
        return (loss(module(batch)) if loss else module(batch).pow(2).mean()), {}

    return [Phase("only", module, default, **{"learning_rate": 0.1, **fields})], module


@pytest.mark.parametrize("stop", [1, 6, 7, 11])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(stop: int, tmp_path: Path) -> None:
    phases, student = two_phases()
    whole = train(phases, batches, student, CONFIG, tmp_path / "whole")
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)

    phases, student = two_phases()
    with pytest.raises(KeyboardInterrupt):
        train(phases, stop_at(stop), student, CONFIG, tmp_path / "parts")
    phases, student = two_phases(seed=99)
    parts = train(phases, batches, student, CONFIG, tmp_path / "parts")
    resumed = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)

    assert_equal(whole.state_dict(), parts.state_dict())
    for name in ("modules", "ema", "optimizers"):
        assert_equal(state[name], resumed[name])
    curves = zip(read_curve(tmp_path / "whole"), read_curve(tmp_path / "parts"), strict=True)
    for one, other in curves:  # a point leaves out a phase that has rested since the run was resumed
        assert other | {"seconds": 0} == {name: one[name] for name in other} | {"seconds": 0}


def assert_equal(left: Any, right: Any) -> None:
    """Equality to the bit of nested tensors."""
    if isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


def test_phase_runs_in_iterations_that_every_divides_and_alone_receives_gradients(tmp_path: Path) -> None:
    phases, student = two_phases()
    critic = phases[0].module
    trainable: list[tuple[int, int, bool, bool]] = []

    def spy(step: int, phase: int) -> Tensor:
        trainable.append((step, phase, critic[0].weight.requires_grad, student.weight.requires_grad))
        return batches(step, phase)

    train(phases, spy, student, replace(CONFIG, iterations=4), tmp_path)
    assert [(step, phase) for step, phase, *_ in trainable] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)]
    assert all((on_critic, on_student) == (phase == 0, phase == 1) for _, phase, on_critic, on_student in trainable)


def test_curve_holds_the_last_turn_of_phases_that_rest(tmp_path: Path) -> None:
    """With a point every second iteration and the student in the other ones, its losses must not be lost."""
    phases, student = two_phases()
    train(phases, batches, student, replace(CONFIG, log_every=2), tmp_path)
    curve = read_curve(tmp_path)
    assert [point["step"] for point in curve] == [2, 4, 6, 8, 10, 12]
    expected = {f"{phase}/{name}" for phase in ("critic", "student") for name in ("loss", "gradient_norm")}
    assert all(point.keys() == expected | {"student/twice", "step", "seconds"} for point in curve)
    assert all(point["student/twice"] == pytest.approx(2 * point["student/loss"]) for point in curve)


def test_average_follows_its_formula(tmp_path: Path) -> None:
    """`ema <- d ema + (1 - d) w` with `d = min(decay, (1 + n) / (10 + n))`, beginning at the first update's weights."""
    phases, module = linear_phase()
    history: list[Tensor] = []
    averages: list[Tensor] = []

    def remember(average: Any, step: int) -> None:
        history.append(module.weight.detach().clone())
        averages.append(average.weight.clone())

    config = replace(CONFIG, iterations=30, ema_decay=0.6)
    result = train(phases, batches, module, config, tmp_path, remember)
    expected = history[0]
    for count, (weight, average) in enumerate(zip(history, averages, strict=True)):
        if count:
            decay = min(0.6, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average, expected)
    assert result is module
    torch.testing.assert_close(module.weight.detach(), averages[-1])


def test_learning_rate_warms_up_holds_and_decays_to_zero(tmp_path: Path) -> None:
    """A gradient of constant sign makes each of Adam's steps as long as the rate."""
    phases, module = linear_phase(loss=lambda output: output.sum(), learning_rate=0.5, betas=(0.0, 0.0))
    weights = [module.bias.item()]

    def remember(average: object, step: int) -> None:
        weights.append(module.bias.item())

    config = replace(CONFIG, iterations=20, warmup=5, decay=0.25, weight_decay=0.0)
    train(phases, lambda step, phase: torch.ones(1, 3), module, config, tmp_path, remember)
    rates = [(before - after) / 0.5 for before, after in pairwise(weights)]
    expected = [0.2, 0.4, 0.6, 0.8, *[1.0] * 12, 0.8, 0.6, 0.4, 0.2]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    phases, module = linear_phase(loss=lambda output: 1e4 * output.sum())
    seen: list[float] = []

    def note(optimizer: Any, *_: object) -> None:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    handle = register_optimizer_step_pre_hook(note)
    try:
        train(phases, batches, module, replace(CONFIG, iterations=2, gradient_norm=0.7), tmp_path)
    finally:
        handle.remove()
    assert seen == pytest.approx([0.7, 0.7], rel=1e-3)
    assert all(point["only/gradient_norm"] > 1e3 for point in read_curve(tmp_path))  # what is logged is not clipped


@pytest.mark.parametrize("log_every", [1, 100])
def test_divergence_says_what_to_do_and_keeps_the_last_good_checkpoint(log_every: int, tmp_path: Path) -> None:
    """Also when no point of the curve is due: weights of NaN never reach the checkpoint."""
    phases, module = linear_phase()
    good: list[bytes] = []

    def broken_at_five(step: int, phase: int) -> Tensor:
        if step == 5:
            good.append((tmp_path / "state.pt").read_bytes())
        return batches(step, phase) * (math.nan if step == 5 else 1)

    with pytest.raises(FewstepError, match=re.escape("diverged at step 6")) as caught:
        train(phases, broken_at_five, module, replace(CONFIG, log_every=log_every), tmp_path)
    assert "lower the learning rate" in str(caught.value)
    assert (tmp_path / "state.pt").read_bytes() == good[0]


def test_divergence_in_the_last_iteration_is_not_exported(tmp_path: Path) -> None:
    phases, module = linear_phase()
    config = replace(CONFIG, log_every=100, checkpoint_minutes=100)
    with pytest.raises(FewstepError, match="diverged"):
        train(phases, lambda step, phase: torch.full((2, 3), math.inf), module, config, tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    phases, student = two_phases()
    train(phases, batches, student, CONFIG, tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(FewstepError, match="another run: give the same method and seed"):
        train(phases, batches, student, replace(CONFIG, seed=4), tmp_path)
    with pytest.raises(FewstepError, match="another run"):
        train(phases[:1], batches, student, CONFIG, tmp_path)
    wider = nn.Linear(4, 4)
    phases[1] = replace(phases[1], module=wider)
    with pytest.raises(FewstepError, match="does not fit these networks"):
        train(phases, batches, wider, CONFIG, tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_finished_run_trains_no_further_and_a_larger_budget_continues_it(tmp_path: Path) -> None:
    phases, student = two_phases()
    weights = train(phases, batches, student, CONFIG, tmp_path).state_dict()
    phases, student = two_phases(seed=5)
    again = train(phases, stop_at(12), student, CONFIG, tmp_path).state_dict()  # asks for no batch
    assert_equal(weights, again)
    asked: list[int] = []

    def spy(step: int, phase: int) -> Tensor:
        asked.append(step)
        return batches(step, phase)

    train(phases, spy, student, replace(CONFIG, iterations=14), tmp_path)
    assert sorted(set(asked)) == [12, 13]


def test_minutes_end_a_run(tmp_path: Path) -> None:
    phases, module = linear_phase()
    config = replace(CONFIG, iterations=1_000_000, minutes=0.5 / 60, checkpoint_minutes=100)
    train(phases, batches, module, config, tmp_path)
    curve = read_curve(tmp_path)
    assert curve[-2]["seconds"] <= 0.5 <= curve[-1]["seconds"]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["optimizers"][0]["param_groups"][0]["lr"] < 0.05  # the rate follows the clock down from 0.1


def test_randomness_of_a_step_depends_on_seed_step_and_phase_only() -> None:
    def draw(seed: int, step: int, phase: int) -> float:
        return torch.rand((), generator=step_generator(seed, step, phase, torch.device("cpu"))).item()

    keys = [(seed, step, phase) for seed in range(3) for step in range(5) for phase in range(3)]
    assert [draw(*key) for key in keys] == [draw(*key) for key in keys]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_unknown_or_absent_device_is_refused() -> None:
    assert training_device("cpu") == torch.device("cpu")
    names = ["tpu"] if torch.cuda.is_available() else ["tpu", "cuda"]
    for name in names:
        with pytest.raises(FewstepError, match=f"no device '{name}' here: use --device cpu"):
            training_device(name)


def test_one_process_trains_in_either_precision(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def note(output: Tensor) -> Tensor:
        seen.append(output.dtype)
        return output.float().pow(2).mean()

    for precision in ("bf16", "no", "bf16"):
        phases, module = linear_phase(loss=note)
        folder = tmp_path / str(len(seen))
        train(phases, batches, module, replace(CONFIG, iterations=1, precision=precision), folder)
        assert module.weight.dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(FewstepError, match="'fp16' is not supported in training: choose no or bf16"):
        TrainerConfig(precision="fp16")
