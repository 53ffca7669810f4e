"""Noise schedules: end points, derivatives, units, agreement with diffusers, reading of configs."""

import json
from collections.abc import Mapping

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.schedule import (
    EDM,
    VP,
    Flow,
    Schedule,
    Trig,
    prediction_from_config,
    schedule_from_config,
    uniform_times,
)

FUNCTIONS = ["alpha", "sigma", "d_alpha", "d_sigma", "network_time", "input_scale"]


def config_of(name: str, **settings: object) -> dict[str, object]:
    """What diffusers writes to `scheduler_config.json`."""
    config: dict[str, object] = json.loads(getattr(diffusers, name)(**settings).to_json_string())
    return config


def test_time_zero_is_exactly_clean(schedule: Schedule) -> None:
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(2, dtype=dtype)
        assert torch.equal(schedule.alpha(zero), torch.ones_like(zero))
        assert torch.equal(schedule.sigma(zero), torch.zeros_like(zero))


def test_signal_to_noise_falls_with_time(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    ratio = schedule.sigma(t).atan2(schedule.alpha(t))
    assert (ratio.diff() > 0).all()


@pytest.mark.parametrize("level", ["alpha", "sigma"])
def test_derivatives_are_those_of_the_levels(schedule: Schedule, level: str) -> None:
    t = torch.linspace(0.0123, 0.9876, 50, dtype=torch.float64, requires_grad=True)
    values = getattr(schedule, level)(t)
    (expected,) = torch.autograd.grad(values.sum(), t) if values.requires_grad else (torch.zeros_like(t),)
    torch.testing.assert_close(getattr(schedule, f"d_{level}")(t), expected, rtol=1e-10, atol=1e-12)


def test_variance_preserving_processes_keep_unit_variance(processes: Mapping[str, Schedule]) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for name in ("vp-linear", "vp-scaled-linear", "vp-squaredcos", "trig"):
        total = processes[name].alpha(t) ** 2 + processes[name].sigma(t) ** 2
        torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_dtype_and_shape_are_kept(
    schedule: Schedule, function: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    result = getattr(schedule, function)(torch.full(shape, 0.37, dtype=dtype))
    assert (result.dtype, result.shape) == (dtype, shape)
    # float32 must be as good as float32 allows: the thousand steps of VP cost it three digits in position.
    exact = getattr(schedule, function)(torch.full(shape, 0.37, dtype=torch.float64))
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_device_is_kept(schedule: Schedule) -> None:
    t = torch.tensor([0.2, 0.9], device="cuda")
    for function in FUNCTIONS:
        result = getattr(schedule, function)(t)
        assert result.device == t.device
        torch.testing.assert_close(result.cpu(), getattr(schedule, function)(t.cpu()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_vp_passes_through_the_training_steps(betas: str) -> None:
    table = DDIMScheduler(beta_schedule=betas).alphas_cumprod
    step = torch.arange(len(table), dtype=torch.float64)
    t = (step + 1) / len(table)
    schedule = VP(table)
    # exp(log(...)) of the same float32 numbers, in float64; the cosine table ends at 2.4e-9, below the floor of 2^-24
    torch.testing.assert_close(schedule.alpha(t) ** 2, table.double().clamp_min(2.0**-24), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.network_time(t), step, rtol=0, atol=1e-9)


def test_zero_terminal_snr_stays_finite() -> None:
    table = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert table[-1] == 0
    schedule, end = VP(table), torch.ones((), dtype=torch.float64)
    assert schedule.alpha(end) == pytest.approx(2.0**-12)
    assert all(torch.isfinite(getattr(schedule, function)(end)) for function in FUNCTIONS)


def test_a_traced_vp_process_is_still_itself_afterwards() -> None:
    """What it keeps of its table must not be a trace's stand-in."""

    class Levels(torch.nn.Module):
        schedule = VP(DDIMScheduler().alphas_cumprod)

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.schedule.alpha(t) + self.schedule.sigma(t)

    levels, t = Levels(), torch.rand(5)
    program = torch.export.export(levels, (t,)).module()
    torch.testing.assert_close(program(t), levels(t))


def test_flow_shift_is_that_of_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    # diffusers keeps its table in float32
    torch.testing.assert_close(Flow(3.0).sigma(t), scheduler.sigmas.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(Flow(3.0).network_time(t), scheduler.timesteps.double(), rtol=1e-6, atol=0)


def test_edm_preconditioning_is_that_of_diffusers() -> None:
    scheduler = diffusers.EDMEulerScheduler()
    schedule = EDM()
    t = torch.linspace(0.2, 1, 9, dtype=torch.float64)
    sigma = schedule.sigma(t)
    torch.testing.assert_close(schedule.network_time(t), scheduler.precondition_noise(sigma))
    torch.testing.assert_close(schedule.input_scale(t), scheduler.precondition_inputs(torch.ones_like(t), sigma))


def test_uniform_edm_times_are_karras_spacing() -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(8)
    last = (0.002 / 80) ** (1 / 7)
    t = torch.linspace(1, last, 8, dtype=torch.float64)
    torch.testing.assert_close(EDM().sigma(t), scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)  # float32 powers of 7


@pytest.mark.parametrize(
    ("config", "schedule", "prediction"),
    [
        (config_of("FlowMatchEulerDiscreteScheduler", shift=3.0), Flow(3.0), "flow_prediction"),
        (
            config_of(
                "DPMSolverMultistepScheduler",
                use_flow_sigmas=True,
                flow_shift=2.5,
                prediction_type="flow_prediction",
                num_train_timesteps=500,
            ),
            Flow(2.5, train_steps=500),
            "flow_prediction",
        ),
        (config_of("EDMEulerScheduler", sigma_max=60.0, sigma_data=1.0), EDM(60.0, 1.0), "edm"),
        (config_of("SCMScheduler"), Trig(), "v_prediction"),
    ],
    ids=lambda value: value.get("_class_name") if isinstance(value, dict) else "",
)
def test_configs_of_continuous_processes(config: dict[str, object], schedule: Schedule, prediction: str) -> None:
    assert schedule_from_config(config) == schedule
    assert prediction_from_config(config) == prediction


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "LCMScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_configs_of_discrete_betas(name: str, prediction: str) -> None:
    settings = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "prediction_type": prediction}
    schedule = schedule_from_config(config_of(name, **settings))
    assert isinstance(schedule, VP)
    assert torch.equal(schedule.alphas_cumprod, getattr(diffusers, name)(**settings).alphas_cumprod)
    assert prediction_from_config(config_of(name, **settings)) == prediction


def test_a_config_without_its_class_is_refused() -> None:
    in_memory = diffusers.FlowMatchEulerDiscreteScheduler().config
    for read in (schedule_from_config, prediction_from_config):
        with pytest.raises(FewstepError, match="does not name its class"):
            read(in_memory)


def test_unknown_processes_are_refused() -> None:
    with pytest.raises(FewstepError, match="CMStochasticIterativeScheduler"):
        schedule_from_config(config_of("CMStochasticIterativeScheduler"))
    with pytest.raises(FewstepError, match="v_prediction"):
        prediction_from_config(config_of("EDMEulerScheduler", prediction_type="v_prediction"))


def test_uniform_times() -> None:
    assert uniform_times(1) == [1.0, 0.0]
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_times(2, start=0.5) == [0.5, 0.25, 0.0]
