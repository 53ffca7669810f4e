"""Conversions between prediction types: definitions, round trips, denoisers and guidance built on them."""

import pytest
import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, Denoiser, GuidedDenoiser, add_noise, levels
from fewstep.runtime.prediction import FROM_SAMPLE, TO_SAMPLE, edm_to_sample, sample_to_edm
from fewstep.runtime.schedule import EDM, Flow, Schedule

TYPES = sorted(TO_SAMPLE)
DEFINITIONS = {
    "epsilon": lambda x_0, eps, alpha, sigma: eps,
    "v_prediction": lambda x_0, eps, alpha, sigma: alpha * eps - sigma * x_0,
    "sample": lambda x_0, eps, alpha, sigma: x_0,
    "flow_prediction": lambda x_0, eps, alpha, sigma: eps - x_0,
}


def pairs(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_0, eps, x_t, alpha and sigma for 20 samples at their own times, alpha and sigma both above 0."""
    x_0, eps = torch.randn(2, 20, 3, 2, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    return x_0, eps, add_noise(schedule, x_0, eps, t), *levels(schedule, t, x_0)


@pytest.mark.parametrize("prediction", TYPES)
def test_conversions_follow_the_definitions(schedule: Schedule, prediction: str) -> None:
    x_0, eps, x_t, alpha, sigma = pairs(schedule)
    output = DEFINITIONS[prediction](x_0, eps, alpha, sigma)
    # sigma / alpha reaches 56 and EDM's sigma falls to 6e-8, which costs float64 up to eight of its sixteen digits
    torch.testing.assert_close(TO_SAMPLE[prediction](output, x_t, alpha, sigma), x_0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(FROM_SAMPLE[prediction](x_0, x_t, alpha, sigma), output, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prediction", TYPES)
def test_round_trips(schedule: Schedule, prediction: str) -> None:
    _, _, x_t, alpha, sigma = pairs(schedule)
    output = torch.randn_like(x_t)
    there = TO_SAMPLE[prediction](output, x_t, alpha, sigma)
    torch.testing.assert_close(FROM_SAMPLE[prediction](there, x_t, alpha, sigma), output, rtol=1e-7, atol=1e-7)


def test_edm_round_trip_and_limits() -> None:
    schedule = EDM()
    x_0, _, x_t, _, sigma = pairs(schedule)
    output = sample_to_edm(x_0, x_t, sigma, 0.5)
    torch.testing.assert_close(edm_to_sample(output, x_t, sigma, 0.5), x_0, rtol=1e-7, atol=1e-7)
    # c_skip = 1 and c_out = 0 without noise: the prediction is the sample, whatever the network says
    torch.testing.assert_close(edm_to_sample(output, x_t, torch.zeros_like(sigma), 0.5), x_t)


def test_edm_target_has_unit_variance() -> None:
    """Karras et al. 2022, arXiv 2206.00364, appendix B.6: what defines c_skip and c_out."""
    x_0 = 0.5 * torch.randn(200_000, dtype=torch.float64)
    for level in (0.1, 0.5, 20.0):
        sigma = torch.tensor(level, dtype=torch.float64)
        target = sample_to_edm(x_0, x_0 + sigma * torch.randn_like(x_0), sigma, 0.5)
        assert target.std() == pytest.approx(1, abs=0.01)  # six standard errors


def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
    time = network_time.reshape(-1, 1, 1)
    return torch.tanh(x.flip(-1) + 0.01 * time) + condition["shift"].reshape(-1, 1, 1) * x.sin()


@pytest.mark.parametrize("prediction", TYPES)
def test_denoiser_undoes_the_prediction_type(schedule: Schedule, prediction: str) -> None:
    """A network that outputs the type's target for x_0 makes a denoiser that outputs x_0."""
    x_0, eps, x_t, alpha, sigma = pairs(schedule)
    target = DEFINITIONS[prediction](x_0, eps, alpha, sigma)
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    denoiser = Denoiser(lambda x, network_time, condition: target, schedule, prediction)
    torch.testing.assert_close(denoiser(x_t, t, {}), x_0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_networks_get_exact_times_of_shape_batch(dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    def record(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        seen.append(network_time)
        return x

    denoiser = Denoiser(record, Flow(), "flow_prediction")
    for t in (torch.tensor(0.999, dtype=torch.float64), torch.full((4,), 0.999)):
        result = denoiser(torch.zeros(4, 3, 2, dtype=dtype), t, {})
        assert result.dtype == dtype
    for time in seen:  # bfloat16 would make 1000 of 999
        torch.testing.assert_close(time.double(), torch.full((4,), 999.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", [*TYPES, "edm"])
def test_guidance_on_the_sample_equals_guidance_on_the_output(prediction: str) -> None:
    schedule = EDM() if prediction == "edm" else Flow(3.0)
    _, _, x_t, _, _ = pairs(schedule)
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    condition = {"shift": torch.linspace(-1, 1, 20, dtype=torch.float64)}
    negative = {"shift": torch.full((1,), 0.3, dtype=torch.float64)}
    scale = 4.5

    def guided_network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        unconditional = network(x, network_time, negative)
        return unconditional + scale * (network(x, network_time, condition) - unconditional)

    on_sample = GuidedDenoiser(Denoiser(network, schedule, prediction), scale, negative)
    on_output = Denoiser(guided_network, schedule, prediction)
    torch.testing.assert_close(on_sample(x_t, t, condition), on_output(x_t, t, condition), rtol=1e-9, atol=1e-9)
    middle = t[10]  # one time for the whole batch
    torch.testing.assert_close(
        on_sample(x_t, middle, condition), on_output(x_t, middle, condition), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guidance_scale_one_is_conditional_and_zero_unconditional(scale: float) -> None:
    denoiser = Denoiser(network, Flow(), "flow_prediction")
    x_t, t = torch.randn(3, 2, 2, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    condition, negative = {"shift": torch.ones(3).double()}, {"shift": torch.zeros(1).double()}
    expected = denoiser(x_t, t, condition if scale else negative)
    torch.testing.assert_close(GuidedDenoiser(denoiser, scale, negative)(x_t, t, condition), expected)
