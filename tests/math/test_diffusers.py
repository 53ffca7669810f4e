"""Samplers against diffusers' schedulers, on the same network at the same steps.

diffusers keeps its levels in float32 and ours are float64, so results agree to float32's 6e-8 times what an error in
them grows by: `1 / alpha = 15` for an epsilon network at the noisiest step. `CLOSE` leaves a factor of ten.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, Denoiser
from fewstep.runtime.samplers import SAMPLERS
from fewstep.runtime.schedule import EDM, Schedule, prediction_from_config, schedule_from_config, uniform_times

# diffusers hands tensors to numpy in a way that numpy 2 is about to refuse
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
    """Smooth, nonlinear, different at every time, and mixing all elements."""
    time = network_time.double().reshape(-1, 1) / 300
    weights = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.tanh(x @ weights + time) + 0.3 * torch.sin(x * time)


def draw(k: int) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k))


def denoiser_of(scheduler: Any) -> Denoiser:
    config = json.loads(scheduler.to_json_string())
    return Denoiser(network, schedule_from_config(config), prediction_from_config(config))


def theirs(scheduler: Any, step_options: Callable[[int], dict[str, Any]] = lambda step: {}) -> Tensor:
    """diffusers' own loop, from noise that its scheduler scales."""
    x = draw(0) * getattr(scheduler, "init_noise_sigma", 1.0)
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t, {}), t, x, **step_options(step)).prev_sample
    return x


def ours(name: str, scheduler: Any, times: list[float], scale: float = 1.0, noise: Any = draw) -> Tensor:
    return SAMPLERS[name].function(denoiser_of(scheduler), scale * draw(0), times, {}, noise)


def training_times(scheduler: Any) -> list[float]:
    """Our times of its integer steps, then 0."""
    return [(int(step) + 1) / scheduler.config.num_train_timesteps for step in scheduler.timesteps] + [0.0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_ddim(prediction: str, steps: int) -> None:
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(ours("ddim", scheduler, training_times(scheduler)), theirs(scheduler), **CLOSE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_on_vp(prediction: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    # its samples are x_t / alpha
    scale = float(scheduler.init_noise_sigma * scheduler.alphas_cumprod[-1].sqrt())
    torch.testing.assert_close(ours("euler", scheduler, training_times(scheduler), scale), theirs(scheduler), **CLOSE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_euler_on_flow(shift: float, steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=uniform_times(steps)[:-1])
    torch.testing.assert_close(ours("euler", scheduler, uniform_times(steps)), theirs(scheduler), **CLOSE)


def test_euler_on_edm() -> None:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(6)
    times = [float(sigma / 80) ** (1 / 7) for sigma in scheduler.sigmas]
    scale = float(scheduler.init_noise_sigma)
    # the sample falls from 80 to 1, and float32's rounding of sigma with it
    torch.testing.assert_close(ours("euler", scheduler, times, scale), theirs(scheduler), rtol=1e-4, atol=1e-4)


def test_heun_on_flow() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    times = [float(sigma) for sigma in scheduler.sigmas.unique().flip(0)]
    torch.testing.assert_close(ours("heun", scheduler, times), theirs(scheduler), **CLOSE)


def test_heun_on_variance_exploding_form() -> None:
    """diffusers' Heun steps in `x_t / alpha = x_0 + sigma eps`, EDM's form of a VP network: ours with `alpha = 1`."""
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    times_of = dict(zip(scheduler.sigmas.tolist(), scheduler.timesteps.tolist(), strict=False))
    sigmas = sorted(times_of, reverse=True)
    process = EDM(sigma_max=sigmas[0], rho=1.0)

    class Exploding:
        schedule: Schedule = process

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            sigma = min(sigmas, key=lambda known: abs(known - float(process.sigma(t))))
            eps = network(x_t / (sigma**2 + 1) ** 0.5, torch.tensor(times_of[sigma]), condition)
            return x_t - sigma * eps

    times = [sigma / sigmas[0] for sigma in sigmas] + [0.0]
    result = SAMPLERS["heun"].function(Exploding(), draw(0) * scheduler.init_noise_sigma, times, {}, draw)
    torch.testing.assert_close(result, theirs(scheduler), **CLOSE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_dpm_solver_on_vp(prediction: str, steps: int) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(ours("dpm++2m", scheduler, training_times(scheduler)), theirs(scheduler), **CLOSE)


def flow_times(steps: int) -> list[float]:
    """diffusers' DPM-Solver starts flows at the noisiest training step that is not pure noise."""
    return [0.999 * (steps - step) / steps for step in range(steps)] + [0.0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_on_flow(shift: float) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(8)
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]  # it would cut the network's times to whole numbers
    torch.testing.assert_close(ours("dpm++2m", scheduler, flow_times(8)), theirs(scheduler), **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_sde_dpm_solver_with_the_same_noise(steps: int) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, lambda step: {"variance_noise": draw(step + 1)})
    # diffusers takes the noise in float32
    torch.testing.assert_close(ours("sde-dpm++2m", scheduler, training_times(scheduler)), expected, **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampler_is_lcm_without_its_boundary(steps: int) -> None:
    # a large timestep_scaling makes LCM's c_skip 0 and its c_out 1
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False, timestep_scaling=1e6)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    expected = theirs(scheduler, lambda step: {"generator": generator})
    generator = torch.Generator().manual_seed(3)

    def same_noise(k: int) -> Tensor:
        return torch.randn(5, 6, dtype=torch.float64, generator=generator)

    result = ours("consistency", scheduler, training_times(scheduler), noise=same_noise)
    torch.testing.assert_close(result, expected, **CLOSE)


def test_consistency_sampler_is_trigflows() -> None:
    scheduler = diffusers.SCMScheduler(sigma_data=1.0)
    scheduler.set_timesteps(4, max_timesteps=torch.pi / 2, intermediate_timesteps=None)
    generator = torch.Generator().manual_seed(3)
    x = draw(0)
    for angle, _ in pairwise(scheduler.timesteps):
        x = scheduler.step(network(x, angle, {}), angle, x, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(3)

    def same_noise(k: int) -> Tensor:
        return torch.randn(5, 6, generator=generator)

    torch.testing.assert_close(ours("consistency", scheduler, uniform_times(4), noise=same_noise), x, **CLOSE)
