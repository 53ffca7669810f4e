"""What goes wrong in a training: divergence, collapse, damaged data and files, changed recipes, a full disk."""

import math
import re
import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.errors import FewstepError
from fewstep.training.phase import Draws, Loss, Phase
from fewstep.training.recorder import read_curve
from fewstep.training.trainer import train

from .runs import CONFIG, STEADY, batches, linear_phase, stop_at, two_phases


def falling(start: float = 0.0) -> tuple[list[Phase[Tensor]], nn.Module]:
    """A weight that falls by the rate in each step, with a loss that is no longer a number below -0.25."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([start]))

    def loss(batch: Tensor, draws: Draws) -> Loss:
        return (module.weight + 0.25).sqrt().sum(), {}

    return [Phase("falling", module, loss, 0.1, betas=(0.0, 0.0))], module


@pytest.mark.parametrize("log_every", [1, 100])
def test_divergence_says_what_to_do_and_keeps_the_last_good_checkpoint(log_every: int, tmp_path: Path) -> None:
    """Also when no point of the curve is due: weights of NaN never reach the checkpoint."""
    phases, module = falling()
    with pytest.raises(FewstepError, match=re.escape("diverged at step 4")) as caught:
        train(phases, batches, module, replace(STEADY, log_every=log_every), tmp_path)
    assert "lower the learning rate" in str(caught.value)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 3
    assert state["turns"][0]["module"]["weight"].item() == pytest.approx(-0.3, abs=1e-5)


def test_divergence_in_the_last_iteration_is_not_exported(tmp_path: Path) -> None:
    phases, module = falling(start=-1.0)
    config = replace(CONFIG, iterations=1, log_every=100, checkpoint_minutes=100)
    with pytest.raises(FewstepError, match="diverged"):
        train(phases, batches, module, config, tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_damaged_samples_are_told_from_a_high_learning_rate(tmp_path: Path) -> None:
    phases, module = linear_phase()
    config = replace(CONFIG, log_every=4, checkpoint_minutes=100, rollback=True)

    def damaged(step: int, phase: int) -> Tensor:
        return batches(step, phase) * (math.nan if step == 5 else 1)

    with pytest.raises(FewstepError, match="a batch of step 6 holds NaN or infinite values: find and replace"):
        train(phases, damaged, module, config, tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["step"] == 0


def test_rollback_halves_the_rate_until_training_holds(tmp_path: Path) -> None:
    """Twelve steps of 0.1 or 0.05 fall too far, of 0.025 just not too far."""
    phases, module = falling(start=0.06)
    train(phases, batches, module, replace(STEADY, rollback=True, checkpoint_minutes=100), tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["progress"]["rollbacks"] == 2
    assert state["turns"][0]["module"]["weight"].item() == pytest.approx(0.06 - 12 * 0.025, abs=1e-5)
    assert [point["step"] for point in read_curve(tmp_path)] == list(range(1, 13))


def test_rollbacks_are_limited(tmp_path: Path) -> None:
    phases, module = falling(start=-1.0)
    with pytest.raises(FewstepError, match="diverged at step 1"):
        train(phases, batches, module, replace(STEADY, rollback=True), tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["rollbacks"] == 5


class CollapseOnce:
    """A watch that sees a collapse coming at step 4 and reports it at step 6, the first time."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.resets: list[int] = []

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        assert metrics.keys() == {"only/loss", "only/gradient_norm"}
        self.seen.append(step)
        return step == 6 and len(self.resets) == 1

    def reset(self, step: int) -> None:
        self.resets.append(step)

    def sound(self) -> bool:
        return self.seen[-1:] != [4] or len(self.resets) > 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [*self.seen], "resets": [*self.resets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.resets = state["seen"], state["resets"]


@pytest.mark.parametrize("rollback", [False, True])
def test_collapse_that_the_watch_sees_brings_back_the_last_checkpoint(rollback: bool, tmp_path: Path) -> None:
    phases, module = linear_phase()
    watch = CollapseOnce()
    config = replace(STEADY, log_every=2, checkpoint_minutes=100, rollback=rollback)
    train(phases, batches, module, config, tmp_path, watch=watch)
    assert watch.seen == ([2, 4, 6] if rollback else []) + [2, 4, 6, 8, 10, 12]
    assert watch.resets == ([0, 0] if rollback else [0])
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["rollbacks"] == rollback


def test_a_state_that_looks_unsound_is_not_kept_to_go_back_to(tmp_path: Path) -> None:
    phases, module = linear_phase()
    watch = CollapseOnce()
    config = replace(STEADY, iterations=6, log_every=2, checkpoint_minutes=0, rollback=True)
    train(phases, batches, module, config, tmp_path, watch=watch)
    # Steps 4 and 5 were not saved: the run went back to step 3.
    assert watch.seen == [2, 4, 6, 4, 6]
    assert watch.resets == [0, 3]


def test_watch_goes_on_with_what_it_had_seen(tmp_path: Path) -> None:
    phases, module = linear_phase()
    config = replace(STEADY, log_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(phases, stop_at(7), module, config, tmp_path, watch=CollapseOnce())
    watch = CollapseOnce()
    train(phases, batches, module, config, tmp_path, watch=watch)
    assert watch.seen == [2, 4, 6, 8, 10, 12]
    assert watch.resets == [0]


def test_a_run_that_was_not_watched_is_watched_from_where_it_stands(tmp_path: Path) -> None:
    phases, module = linear_phase()
    train(phases, batches, module, replace(STEADY, iterations=4), tmp_path)
    watch = CollapseOnce()
    train(phases, batches, module, replace(STEADY, log_every=4), tmp_path, watch=watch)
    assert watch.resets == [4]
    assert watch.seen == [8, 12]


def test_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    phases, student = two_phases()
    train(phases, batches, student, CONFIG, tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(FewstepError, match=re.escape("state.pt (is the disk full?): make room and run")):
            train(phases, batches, student, replace(CONFIG, iterations=20), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "begun with trainer.seed = 3, and is now given 4"),
        ({"warmup": 7}, "begun with trainer.warmup = 4, and is now given 7"),
        ({"accumulation": 2}, "begun with processes x accumulation = 1, and is now given 2"),
    ],
)
def test_changed_recipe_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    phases, student = two_phases()
    train(phases, batches, student, CONFIG, tmp_path, recipe={"batch_size": 4})
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(FewstepError, match=re.escape(message)):
        train(phases, batches, student, replace(CONFIG, **change), tmp_path, recipe={"batch_size": 4})
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_run_that_diverged_goes_on_at_a_lower_rate(tmp_path: Path) -> None:
    """As its message says; thresholds of the watchdog may change as well."""

    def recipe(rate: float, samples: int) -> dict[str, Any]:
        return {"method": {"student_learning_rate": rate}, "watchdog": {"samples": samples}}

    def diverging(rate: float) -> tuple[list[Phase[Tensor]], nn.Module]:
        return linear_phase(lambda output: (output * (1 if rate < 0.1 else math.nan)).pow(2).mean(), learning_rate=rate)

    phases, module = linear_phase()
    train(phases, batches, module, replace(CONFIG, iterations=4), tmp_path, recipe=recipe(0.1, 64))
    phases, module = diverging(0.1)
    with pytest.raises(FewstepError, match=r"diverged at step 5 .*: lower the learning rate and run it again"):
        train(phases, batches, module, CONFIG, tmp_path, recipe=recipe(0.1, 64))
    phases, module = diverging(0.01)
    config = replace(CONFIG, decay=0.0, rollback=True)
    with pytest.raises(FewstepError, match=re.escape("begun with trainer.decay = 1.0, and is now given 0.0")):
        train(phases, batches, module, config, tmp_path, recipe=recipe(0.01, 32))
    train(phases, batches, module, replace(CONFIG, rollback=True), tmp_path, recipe=recipe(0.01, 32))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 12
    assert state["turns"][0]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01 / 12)
    assert state["recipe"]["phases"]["only"]["learning_rate"] == 0.01


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    phases, student = two_phases()
    train(phases, batches, student, CONFIG, tmp_path, recipe={"method": {"times": (0.1, 0.9)}})
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(
        FewstepError, match=re.escape("begun with method.times = [0.1, 0.9], and is now given [0.1, 1.0]")
    ):
        train(phases, batches, student, CONFIG, tmp_path, recipe={"method": {"times": (0.1, 1.0)}})
    recipe = {"method": {"times": [0.1, 0.9]}}
    with pytest.raises(FewstepError, match=re.escape("begun with phases.student = {")):
        train(phases[:1], batches, student, CONFIG, tmp_path, recipe=recipe)
    rarer = [phases[0], replace(phases[1], every=3)]
    with pytest.raises(FewstepError, match=re.escape("begun with phases.student.every = 2, and is now given 3")):
        train(rarer, batches, student, CONFIG, tmp_path, recipe=recipe)
    wider = nn.Linear(4, 4)
    phases[1] = replace(phases[1], module=wider)
    with pytest.raises(FewstepError, match="does not fit these networks"):
        train(phases, batches, wider, CONFIG, tmp_path, recipe=recipe)
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    phases, module = linear_phase()
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(FewstepError, match="is damaged: remove it to begin again"):
        train(phases, batches, module, CONFIG, tmp_path)
    torch.save({"step": 3}, tmp_path / "state.pt")
    with pytest.raises(FewstepError, match="another version of fewstep wrote"):
        train(phases, batches, module, CONFIG, tmp_path)
