"""The training loop: resuming, averages, the learning rate, budgets and what it refuses."""

import copy
import json
import weakref
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fewstep.runtime.errors import FewstepError
from fewstep.training.memory import activation_memory
from fewstep.training.numerics import step_draws, training_device
from fewstep.training.phase import Average, Draws, Loss, Phase
from fewstep.training.picture import save_grid
from fewstep.training.progress import remaining
from fewstep.training.recorder import read_curve
from fewstep.training.teacher import TeacherConfig, build_teacher
from fewstep.training.trainer import train

from .runs import CONFIG, batches, linear_phase, stop_at, two_phases


@pytest.mark.parametrize("stop", [1, 6, 7, 11])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(stop: int, tmp_path: Path) -> None:
    phases, student = two_phases()
    train(phases, batches, student, CONFIG, tmp_path / "whole")
    whole = student.state_dict()
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)

    phases, student = two_phases()
    with pytest.raises(KeyboardInterrupt):
        train(phases, stop_at(stop), student, CONFIG, tmp_path / "parts")
    phases, student = two_phases(seed=99)
    train(phases, batches, student, CONFIG, tmp_path / "parts")
    resumed = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)

    assert_equal(whole, student.state_dict())
    for name in ("turns", "ema"):
        assert_equal(state[name], resumed[name])
    curves = zip(read_curve(tmp_path / "whole"), read_curve(tmp_path / "parts"), strict=True)
    assert all(one | {"seconds": 0} == other | {"seconds": 0} for one, other in curves)


@pytest.mark.gpu
def test_interrupted_and_resumed_equals_uninterrupted_on_a_gpu(tmp_path: Path) -> None:
    def on_gpu(step: int, phase: int) -> Tensor:
        return batches(step, phase).to("cuda")

    phases, student = two_phases(device="cuda")
    train(phases, on_gpu, student, CONFIG, tmp_path / "whole")
    whole = student.state_dict()
    phases, student = two_phases(device="cuda")
    with pytest.raises(KeyboardInterrupt):
        train(phases, stop_at(7, on_gpu), student, CONFIG, tmp_path / "parts")
    phases, student = two_phases(seed=99, device="cuda")
    train(phases, on_gpu, student, CONFIG, tmp_path / "parts")
    torch.testing.assert_close(dict(whole), dict(student.state_dict()))


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

    def remember(step: int) -> list[Path]:
        averages.append(module.weight.detach().clone())
        return []

    def note(optimizer: Any, *_: object) -> None:
        history.append(module.weight.detach().clone())

    config = replace(CONFIG, iterations=30, ema_decay=0.6)
    handle = register_optimizer_step_post_hook(note)
    try:
        train(phases, batches, module, config, tmp_path, remember)
    finally:
        handle.remove()
    assert len(history) == len(averages) == 30
    expected = history[0]
    for count, (weight, average) in enumerate(zip(history, averages, strict=True)):
        if count:
            decay = min(0.6, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average, expected)
    assert torch.equal(module.weight.detach(), averages[-1])


def test_learning_rate_warms_up_holds_and_decays_to_zero(tmp_path: Path) -> None:
    """A gradient of constant sign makes each of Adam's steps as long as the rate."""
    phases, module = linear_phase(loss=lambda output: output.sum(), learning_rate=0.5, betas=(0.0, 0.0))
    weights = [module.bias.item()]

    def note(optimizer: Any, *_: object) -> None:
        weights.append(module.bias.item())

    config = replace(CONFIG, iterations=20, warmup=5, decay=0.25, weight_decay=0.0)
    handle = register_optimizer_step_post_hook(note)
    try:
        train(phases, lambda step, phase: torch.ones(1, 3), module, config, tmp_path)
    finally:
        handle.remove()
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


def test_finished_run_trains_no_further_and_a_larger_budget_continues_it(tmp_path: Path) -> None:
    phases, student = two_phases()
    train(phases, batches, student, CONFIG, tmp_path)
    weights = student.state_dict()
    phases, student = two_phases(seed=5)
    train(phases, stop_at(12), student, CONFIG, tmp_path)  # asks for no batch
    assert_equal(weights, student.state_dict())
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
    assert state["turns"][0]["optimizer"]["param_groups"][0]["lr"] < 0.05  # the rate follows the clock down from 0.1


def test_randomness_depends_on_seed_step_phase_and_shard_only() -> None:
    def draw(source: str, **key: int) -> float:
        draws = step_draws(device=torch.device("cpu"), shards=4, **key)
        return torch.rand((), generator=getattr(draws, source)).item()

    keys = [
        {"seed": seed, "step": step, "phase": phase, "shard": shard}
        for seed, step, phase, shard in product(range(3), range(5), range(3), range(4))
    ]
    own = [draw("own", **key) for key in keys]
    assert own == [draw("own", **key) for key in keys]
    assert len(set(own)) == len(keys)
    shared = [draw("shared", **key) for key in keys]
    assert len(set(shared)) == len(keys) // 4  # the same in all shards
    assert not set(own) & set(shared)


def test_accumulated_gradient_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    results = []
    for accumulation in (1, 2):
        torch.manual_seed(1)
        phases, module = linear_phase()

        def joined(step: int, phase: int, count: int = 2 // accumulation) -> Tensor:
            return torch.cat([batches(step * count + piece, phase) for piece in range(count)])

        config = replace(CONFIG, accumulation=accumulation, checkpoint_minutes=100)
        train(phases, joined, module, config, tmp_path / str(accumulation))
        results.append((module.weight, [point["only/loss"] for point in read_curve(tmp_path / str(accumulation))]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_average_that_a_loss_reads_follows_its_source_and_is_resumed(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> Tensor:
        phases, module = linear_phase()
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        slow = copy.deepcopy(module)
        train(phases, stop_at(stop) if stop else batches, module, CONFIG, folder, averages=[Average(slow, module, 0.5)])
        state = torch.load(folder / "state.pt", weights_only=True)
        assert not torch.equal(slow.weight, torch.ones(1, 3))
        assert torch.equal(state["averages"][0]["weight"], slow.weight)
        return slow.weight.detach()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=5)
    assert torch.equal(run(tmp_path / "parts"), whole)


def test_recomputed_activations_take_less_memory_and_give_the_same_weights(tmp_path: Path) -> None:
    weights, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        network: Any = build_teacher(TeacherConfig(layers=3, heads=2), channels=4, size=4)
        states, mask = torch.randn(4, 5, network.config.caption_channels), torch.ones(4, 5)

        def loss(x: Tensor, draws: Draws, network: Any = network, states: Tensor = states) -> Loss:
            return network(x, states, torch.ones(4), encoder_attention_mask=mask).sample.pow(2).mean(), {}  # noqa: B023

        phases = [Phase("only", network, loss, 1e-3)]
        config = replace(CONFIG, iterations=2, gradient_checkpointing=recompute, checkpoint_minutes=100)
        folder = tmp_path / str(recompute)
        train(phases, lambda step, phase: torch.ones(4, 4, 4, 4), network, config, folder)
        weights.append(network.state_dict())
        memory = json.loads((folder / "memory.json").read_text())
        assert memory["peak_mib"] > 10
        kept.append(memory["activations_mib"]["only"])
    torch.testing.assert_close(weights[0], weights[1])
    assert kept[1] < 0.5 * kept[0]


def test_network_that_cannot_recompute_is_refused(tmp_path: Path) -> None:
    phases, module = linear_phase()
    with pytest.raises(FewstepError, match="Linear cannot recompute activations"):
        train(phases, batches, module, replace(CONFIG, gradient_checkpointing=True), tmp_path)


def test_activation_memory_is_what_backward_needs() -> None:
    """The square keeps its input, the product with a weight its input once more: one storage, counted once."""
    module = nn.Linear(256, 256, bias=False)
    x = torch.randn(1024, 256)
    with activation_memory(module) as kept:
        module(x).pow(2).sum()
    assert kept() == pytest.approx(2 * 1024 * 256 * 4 / 2**20)


def test_measuring_activations_keeps_none_alive() -> None:
    """A result that saves itself, and that no backward pass comes by."""
    with activation_memory(nn.Linear(1, 1)):
        result = torch.ones(3, requires_grad=True).exp()
    alive = weakref.ref(result)
    del result
    assert alive() is None


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


def test_half_precision_scales_its_loss_and_resumes_exactly(tmp_path: Path) -> None:
    """Gradients of 1e-7 would vanish in float16; one that overflows is left out."""
    config = replace(CONFIG, precision="fp16", weight_decay=0.0)

    def tiny(output: Tensor) -> Tensor:
        assert output.dtype == torch.float16
        return 1e-7 * output.sum()

    phases, module = linear_phase(loss=tiny)
    nn.init.ones_(module.weight)
    nn.init.zeros_(module.bias)
    with pytest.raises(KeyboardInterrupt):
        train(phases, stop_at(6), module, config, tmp_path)
    train(phases, batches, module, config, tmp_path)
    scaled = module.weight.detach().clone()
    assert not torch.equal(scaled, torch.ones(1, 3))

    phases, module = linear_phase(loss=lambda output: 1e-7 * output.sum())
    nn.init.ones_(module.weight)
    train(phases, batches, module, config, tmp_path / "whole")
    assert torch.equal(module.weight, scaled)


def test_step_whose_gradient_overflows_is_left_out(tmp_path: Path) -> None:
    phases, module = linear_phase(loss=lambda output: 10 * output.float().sum())
    config = replace(CONFIG, precision="fp16", weight_decay=0.0, iterations=12)
    train(phases, batches, module, config, tmp_path)
    norms = [point["only/gradient_norm"] for point in read_curve(tmp_path)]
    assert norms[0] == 0
    assert norms[-1] > 0
    assert module.weight.isfinite().all()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["turns"][0]["scaler"]["scale"] < 65536


def test_tensorboard_shows_the_curve_and_the_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def draw(step: int) -> list[Path]:
        save_grid(torch.full((1, 3, 2, 2), -1 + step / 2), tmp_path / "grid.png", columns=1)
        return [tmp_path / "grid.png"]

    phases, module = linear_phase()
    train(phases, batches, module, replace(CONFIG, iterations=3), tmp_path, draw)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    pictures = [(event.step, Image.open(BytesIO(event.encoded_image_string))) for event in events.Images("grid")]
    assert [(step, picture.getpixel((0, 0))) for step, picture in pictures] == [
        (1, (64,) * 3),
        (2, (128,) * 3),
        (3, (191,) * 3),
    ]
    shown = [(event.step, event.value) for event in events.Scalars("only/loss")]
    assert shown == [(point["step"], pytest.approx(point["only/loss"])) for point in read_curve(tmp_path)]


def test_progress_tells_the_time_left() -> None:
    assert remaining(at_start=0.5, now=0.6, seconds=60) == timedelta(minutes=4)
    assert remaining(at_start=0.5, now=1.0, seconds=60) == timedelta(0)
