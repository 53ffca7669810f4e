"""What all samplers share: their contract at 1, 2 and 4 steps, their cost, their identities, and the registry."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.denoiser import Condition, Denoiser, DenoiserLike, levels
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.prediction import sample_to_epsilon
from fewstep.runtime.samplers import SAMPLERS, get_sampler
from fewstep.runtime.samplers.dpm_solver import dpm_solver
from fewstep.runtime.samplers.grid import level
from fewstep.runtime.samplers.sde_dpm_solver import sde_dpm_solver, sde_step
from fewstep.runtime.schedule import Flow, Schedule, schedule_from_config, uniform_times

NAMES = sorted(SAMPLERS)
ODE_SOLVERS = [name for name in NAMES if not SAMPLERS[name].stochastic]


@dataclass
class Recorder:
    """A denoiser that keeps its calls."""

    inner: DenoiserLike
    times: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.times.append(t)
        self.predictions.append(self.inner(x_t, t, condition))
        return self.predictions[-1]


def fixed_noise(k: int, shape: tuple[int, ...] = (4, 2)) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k))


def noisiest(schedule: Schedule) -> Tensor:
    alpha, sigma = levels(schedule, torch.ones((), dtype=torch.float64), fixed_noise(0))
    return (alpha**2 + sigma**2).sqrt() * fixed_noise(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_trajectories_to_zero(schedule: Schedule, mixture: Any, name: str, steps: int) -> None:
    """From pure noise (`alpha = 0` for flow and trig) to an `x_0`-prediction, at the declared cost."""
    sampler, denoiser = SAMPLERS[name], Recorder(mixture(schedule))
    asked: list[int] = []
    result = sampler.function(
        denoiser, noisiest(schedule), uniform_times(steps), {}, lambda k: (asked.append(k), fixed_noise(k))[1]
    )
    assert torch.isfinite(result).all()
    # Euler and Heun reach x_0 by subtraction, and EDM starts at 80 times the sample
    torch.testing.assert_close(result, denoiser.predictions[-1], rtol=1e-12, atol=1e-12)
    assert len(denoiser.times) == sampler.evaluations(steps)
    assert all(0 < t <= 1 and t.ndim == 0 for t in denoiser.times)
    assert asked == list(range(1, sampler.draws(steps)))


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_prediction_at_the_start(schedule: Schedule, mixture: Any, name: str) -> None:
    teacher, x_t = mixture(schedule), noisiest(schedule)
    result = SAMPLERS[name].function(teacher, x_t, [1.0, 0.0], {}, fixed_noise)
    expected = teacher(x_t, torch.ones((), dtype=torch.float64), {})
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_levels_matter_not_how_time_is_measured(mixture: Any, name: str) -> None:
    """A shifted flow is the plain flow on another clock."""
    shifted = Flow(shift=3.0)
    times = [1.0, 0.8, 0.5, 0.3, 0.1]
    same_levels = [float(shifted.sigma(torch.tensor(t, dtype=torch.float64))) for t in times]
    run = partial(SAMPLERS[name].function, x_t=fixed_noise(0), condition={}, noise=fixed_noise)
    torch.testing.assert_close(
        run(mixture(shifted), times=times), run(mixture(Flow()), times=same_levels), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_deterministic_samplers_draw_no_noise(mixture: Any, name: str) -> None:
    def refuse(k: int) -> Tensor:
        raise AssertionError("a deterministic sampler asked for noise")

    SAMPLERS[name].function(mixture(Flow()), fixed_noise(0), [1.0, 0.5, 0.2], {}, refuse)


@pytest.mark.parametrize("times", [[1.0, 0.7, 0.4, 0.1, 0.0], [0.9, 0.6, 0.3]])
def test_euler_is_ddim(schedule: Schedule, mixture: Any, times: list[float]) -> None:
    teacher, x_t = mixture(schedule), noisiest(schedule)
    euler, ddim = (SAMPLERS[name].function(teacher, x_t, times, {}, fixed_noise) for name in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [[1.0, 0.7, 0.4, 0.1, 0.0], [0.9, 0.6, 0.3, 0.2]])
def test_sde_solver_without_noise_is_the_ode_solver(schedule: Schedule, mixture: Any, times: list[float]) -> None:
    teacher, x_t = mixture(schedule), noisiest(schedule)
    sde = sde_dpm_solver(teacher, x_t, times, {}, fixed_noise, eta=0.0)
    torch.testing.assert_close(sde, dpm_solver(teacher, x_t, times, {}, fixed_noise), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sde_step_keeps_and_adds_noise_in_the_stated_shares(schedule: Schedule, eta: float) -> None:
    """`alpha_s x_0 + sigma_s (e^{-eta h} eps + sqrt(1 - e^{-2 eta h}) z)`, with a time of its own for each sample."""
    x_t, x_0, z = (fixed_noise(k) for k in range(3))
    t, s = (torch.tensor(times, dtype=torch.float64) for times in ([0.9, 0.7, 0.5, 0.2], [0.8, 0.3, 0.4, 0.1]))
    here, there = (level(schedule, time, x_t) for time in (t, s))
    eps = sample_to_epsilon(x_0, x_t, here.alpha, here.sigma)
    h = there.log_snr - here.log_snr
    noise = (-eta * h).exp() * eps + (1 - (-2 * eta * h).exp()).sqrt() * z
    torch.testing.assert_close(
        sde_step(x_t, x_0, z, here, there, eta), there.alpha * x_0 + there.sigma * noise, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float64_levels_do_not_promote_the_samples(name: str, dtype: torch.dtype) -> None:
    denoiser = Denoiser(lambda x, network_time, condition: torch.tanh(x), Flow(), "flow_prediction")
    x_t = torch.randn(2, 3, 4, 4).to(dtype)
    result = SAMPLERS[name].function(denoiser, x_t, uniform_times(3), {}, lambda k: torch.randn_like(x_t))
    assert (result.dtype, result.shape) == (dtype, x_t.shape)


class Trajectory(nn.Module):
    """A whole generation with a one-layer network, as it is exported."""

    def __init__(self, name: str, schedule: Schedule, prediction: str) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)
        self.sampler = SAMPLERS[name].function
        self.denoiser = Denoiser(self.network, schedule, prediction)

    def network(self, x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
        result: Tensor = torch.tanh(self.layer(x)) * network_time.cos()[:, None, None, None]
        return result

    def forward(self, noise: Tensor) -> Tensor:
        return self.sampler(self.denoiser, noise[:, 0], uniform_times(3), {}, partial(noise.select, 1))


@pytest.mark.parametrize(("name", "process"), [*((name, "flow") for name in NAMES), ("heun", "vp")])
def test_samplers_export_with_any_batch(name: str, process: str) -> None:
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear"}
    schedule = Flow() if process == "flow" else schedule_from_config(config)
    module = Trajectory(name, schedule, "flow_prediction" if process == "flow" else "v_prediction").eval()
    exported = torch.export.export(
        module, (torch.randn(2, 3, 2, 4, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    noise = torch.randn(5, 3, 2, 4, 4)
    torch.testing.assert_close(exported(noise), module(noise), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_samples_stay_on_the_device_and_agree(schedule: Schedule) -> None:
    denoiser = Denoiser(lambda x, network_time, condition: torch.tanh(x), schedule, "sample")
    noise = torch.randn(4, 2, 3, 4, 4)
    for sampler in SAMPLERS.values():
        on_gpu = sampler.function(denoiser, noise[0].cuda(), uniform_times(4), {}, lambda k: noise[k].cuda())
        assert on_gpu.is_cuda
        on_cpu = sampler.function(denoiser, noise[0], uniform_times(4), {}, lambda k: noise[k])
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [[1.0], [], [0.5, 0.5], [0.2, 0.6], [1.2, 0.0], [1.0, -0.1], [1.0, float("nan")]])
@pytest.mark.parametrize("name", NAMES)
def test_times_that_do_not_fall_are_refused(mixture: Any, name: str, times: list[float]) -> None:
    with pytest.raises(FewstepError, match="must fall strictly"):
        SAMPLERS[name].function(mixture(Flow()), fixed_noise(0), times, {}, fixed_noise)


def test_registry_suggests_the_nearest_name() -> None:
    assert get_sampler("heun") is SAMPLERS["heun"]
    with pytest.raises(FewstepError, match=r"'dpm\+\+2': did you mean dpm\+\+2m\? .*sde-dpm\+\+2m"):
        get_sampler("dpm++2")
    with pytest.raises(FewstepError, match=r"no sampler 'plms': the samplers are ddim"):
        get_sampler("plms")
