"""Teacher training: the regression target, the loss's known minimum, times and condition dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, Denoiser
from fewstep.runtime.prediction import FROM_SAMPLE
from fewstep.runtime.schedule import Flow
from fewstep.training.batches import ConditionedBatch
from fewstep.training.flow_matching import (
    FlowMatchingConfig,
    denoising_loss,
    drop_condition,
    flow_matching_phase,
    logit_normal_times,
)
from fewstep.training.numerics import step_draws

TARGETS = {
    "epsilon": lambda x_0, eps, alpha, sigma: eps,
    "sample": lambda x_0, eps, alpha, sigma: x_0,
    "v_prediction": lambda x_0, eps, alpha, sigma: alpha * eps - sigma * x_0,
    "flow_prediction": lambda x_0, eps, alpha, sigma: eps - x_0,
}


def test_every_prediction_type_is_covered() -> None:
    assert TARGETS.keys() == FROM_SAMPLE.keys()


@pytest.mark.parametrize("prediction", TARGETS)
def test_target_is_the_defining_formula(prediction: str) -> None:
    """A network that answers 0 has its target's mean square as its loss; the noise is the generator's first draw."""
    x_0, t = torch.randn(64, 3, dtype=torch.float64), torch.rand(64, dtype=torch.float64) * 0.9 + 0.05
    denoiser = Denoiser(lambda x, time, condition: torch.zeros_like(x), Flow(), prediction)
    loss = denoising_loss(denoiser, x_0, t, {}, torch.Generator().manual_seed(5))
    eps = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))
    target = TARGETS[prediction](x_0, eps, 1 - t[:, None], t[:, None])
    torch.testing.assert_close(loss, target.pow(2).mean(), check_dtype=False, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prediction", TARGETS)
def test_exact_denoiser_reaches_the_known_minimum(gaussian: Any, analytic_denoiser: Any, prediction: str) -> None:
    """The minimum is the posterior variance of `x_0`, `v sigma^2 / (alpha^2 v + sigma^2)`, in the target's units."""
    data = gaussian(torch.tensor([0.4, -0.7]), 0.5)
    time, count = 0.6, 40_000
    alpha, sigma = 1 - time, time
    x_0, t = data.sample(count), torch.full((count,), time)
    unit = {"epsilon": alpha / sigma, "sample": 1, "v_prediction": (alpha**2 + sigma**2) / sigma}
    minimum = data.variance * sigma**2 / (alpha**2 * data.variance + sigma**2)
    minimum *= unit.get(prediction, (alpha + sigma) / sigma) ** 2

    def loss(teacher: Any) -> float:
        generator = torch.Generator().manual_seed(7)  # not the seed that x_0 was drawn with
        return denoising_loss(analytic_denoiser(teacher, prediction), x_0, t, {}, generator).item()

    assert loss(data) == pytest.approx(minimum, rel=0.02)
    assert loss(data) < loss(gaussian(data.mean + 0.1, data.variance))
    assert loss(data) < loss(gaussian(data.mean, 1.3 * data.variance))
    assert loss(data) < loss(gaussian(data.mean, 0.7 * data.variance))


def test_logit_of_times_has_the_configured_moments() -> None:
    config = FlowMatchingConfig(time_mean=-0.4, time_deviation=1.3)
    t = logit_normal_times(50_000, config, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert ((t > 0) & (t < 1)).all()
    assert t.logit().mean().item() == pytest.approx(-0.4, abs=0.02)
    assert t.logit().std().item() == pytest.approx(1.3, abs=0.02)


def test_dropped_samples_get_the_negative_condition_and_the_others_keep_theirs() -> None:
    condition = {"states": torch.randn(4, 3, 2), "mask": torch.ones(4, 3, dtype=torch.int64)}
    negative = {"states": torch.randn(1, 3, 2), "mask": torch.zeros(1, 3, dtype=torch.int64)}
    mixed = drop_condition(condition, negative, torch.tensor([True, False, True, False]))
    for name, value in condition.items():
        assert torch.equal(mixed[name][1::2], value[1::2])
        assert torch.equal(mixed[name][::2], negative[name].expand_as(value)[::2])
        assert mixed[name].dtype == value.dtype
    assert drop_condition({}, {}, torch.tensor([True])) == {}


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_share_of_dropped_samples(dropout: float) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        seen.append(condition["label"])
        return x

    count = 4000
    batch = ConditionedBatch(torch.randn(count, 2), {"label": torch.ones(count, 1)})
    config = FlowMatchingConfig(dropout=dropout)
    denoiser = Denoiser(network, Flow(), "flow_prediction")
    phase = flow_matching_phase(torch.nn.Identity(), denoiser, {"label": torch.zeros(1, 1)}, config)
    phase.loss(batch, step_draws(0, 0, 0, batch.x_0.device))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(dropout, abs=0.02)


def test_unconditional_data_needs_no_condition(point_network: Any, point_batch: ConditionedBatch) -> None:
    network = point_network(8)
    phase = flow_matching_phase(network, Denoiser(network, Flow(), "flow_prediction"), {}, FlowMatchingConfig())
    loss, _ = phase.loss(point_batch, step_draws(0, 0, 0, point_batch.x_0.device))
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
