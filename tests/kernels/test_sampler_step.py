"""A sampler's step in one pass: against the runtime's samplers, and its Triton kernel against the torch reference."""

from dataclasses import astuple
from itertools import pairwise

import numpy
import pytest
import torch
from torch import Tensor

from fewstep.kernels.philox import pack_seeds
from fewstep.kernels.sampler_step import SAMPLE_WEIGHTS, Coefficients, sampler_step, sampler_step_reference
from fewstep.runtime.denoiser import Condition, Denoiser, DenoiserLike, GuidedDenoiser
from fewstep.runtime.noise import gaussian_noise
from fewstep.runtime.prediction import TO_SAMPLE
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.samplers.grid import Level, grid
from fewstep.runtime.schedule import VP, Flow, Schedule

SCHEDULES = {"vp": VP(torch.linspace(0.9999, 0.98, 1000, dtype=torch.float64).cumprod(0)), "flow": Flow(shift=3.0)}
TIMES = [0.9, 0.6, 0.3, 0.0]  # an epsilon-prediction says nothing of x_0 where alpha = 0
SEEDS = [3, 2**64 - 1]
CONDITION, NEGATIVE = {"text": torch.tensor([[0.7], [-0.4]])}, {"text": torch.tensor([[0.1]])}
# float32: the order of four terms; halves: one rounding of the result, which the interpreter does by cutting off.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EVERY = Coefficients(x_t=1.5, conditional=-2.5, unconditional=0.75, noise=0.5)
PLAIN = Coefficients(x_t=1.5, conditional=-2.5)


def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
    """Anything that is not affine and heeds the condition."""
    text = condition["text"].to(x)
    return torch.sin(3 * x + text[..., None, None]) + network_time.to(x)[:, None, None, None] / 1000


def coefficients(sampler: str, prediction: str, here: Level, there: Level, guidance: float) -> Coefficients:
    make = Coefficients.consistency if sampler == "consistency" else Coefficients.ddim
    levels = [(float(level.alpha), float(level.sigma)) for level in (here, there)]
    return make(prediction, levels[0], levels[1], guidance)


def both_steps(
    sampler: str, prediction: str, schedule: Schedule, guidance: float, dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor]]:
    """After each step of a trajectory: the runtime's samples, and those of the fused step from the same samples."""
    denoiser = Denoiser(network, schedule, prediction)
    guided: DenoiserLike = denoiser if guidance == 1 else GuidedDenoiser(denoiser, guidance, NEGATIVE)
    condition = {name: value.to(device) for name, value in CONDITION.items()}
    x_t, found, levels = torch.randn(2, 3, 5, 7, dtype=dtype, device=device), [], grid(schedule, TIMES)
    for step, (here, there) in enumerate(pairwise(levels), start=1):
        noise = torch.from_numpy(gaussian_noise(SEEDS, step, x_t.shape[1:])).to(x_t)
        times = [float(here.t), float(there.t)]
        x_s = get_sampler(sampler).function(guided, x_t, times, condition, lambda _, noise=noise: noise)
        conditions = [condition] if guidance == 1 else [{"text": NEGATIVE["text"].expand(2, 1).to(device)}, condition]
        outputs = [network(*denoiser.network_input(x_t, here.t), each) for each in conditions]
        weights = coefficients(sampler, prediction, here, there, guidance)
        fused = sampler_step(x_t, torch.cat(outputs), weights, pack_seeds(SEEDS, device), step)
        found.append((x_s, fused))
        x_t = x_s
    return found


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", TO_SAMPLE)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "consistency"])
def test_steps_equal_the_runtimes_samplers(
    device: str, sampler: str, prediction: str, schedule: str, guidance: float
) -> None:
    arguments = (sampler, prediction, SCHEDULES[schedule], guidance)
    # float64 shows the algebra; 1 / alpha reaches 60.
    for expected, fused in both_steps(*arguments, torch.float64, device):
        torch.testing.assert_close(fused, expected, rtol=1e-11, atol=1e-11)
    # float32: the runtime rounds after each of about ten operations, and its terms cancel: the largest number counts.
    for expected, fused in both_steps(*arguments, torch.float32, device):
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_every_prediction_type_has_weights() -> None:
    assert SAMPLE_WEIGHTS.keys() == TO_SAMPLE.keys()


def test_at_the_clean_end_every_step_is_the_prediction() -> None:
    here, clean = (0.6, 0.8), (1.0, 0.0)
    for make in (Coefficients.ddim, Coefficients.consistency):
        assert astuple(make("v_prediction", here, clean)) == pytest.approx((0.6, -0.8, 0.0, 0.0))
        assert astuple(make("v_prediction", here, clean, 3.0)) == pytest.approx((0.6, -2.4, 1.6, 0.0))


def launch(x_t: Tensor, output: Tensor, step: Coefficients, seeds: Tensor | None = None, draw: int = 0) -> Tensor:
    from fewstep.kernels.sampler_step_triton import launch

    return launch(x_t, output, step, seeds, draw)


def test_noise_is_the_runtimes_to_the_bit(triton_device: str) -> None:
    x_t = torch.randn(2, 4, 9, 9, device=triton_device)
    only_noise, seeds = Coefficients(0.0, 0.0, 0.0, 1.0), pack_seeds(SEEDS, triton_device)
    expected = gaussian_noise(SEEDS, 2, (4, 9, 9))
    for x_s in (launch(x_t, x_t, only_noise, seeds, 2), sampler_step(x_t, x_t, only_noise, seeds, 2)):
        numpy.testing.assert_array_equal(x_s.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 3, 7, 512, 1023, 1025])
@pytest.mark.parametrize(("step", "batch"), [(EVERY, 6), (PLAIN, 3), (PLAIN, 6)])
def test_kernel_equals_the_reference(
    triton_device: str, step: Coefficients, batch: int, size: int, dtype: torch.dtype
) -> None:
    x_t = torch.randn(3, size, device=triton_device).to(dtype)
    output = torch.randn(batch, size, device=triton_device).to(dtype)
    seeds = pack_seeds([1, 2, 3], triton_device)
    result = launch(x_t, output, step, seeds, 1)
    assert result.dtype == dtype
    expected = sampler_step_reference(x_t, output, step, seeds, 1)
    # a difference of up to one rounding of the terms, not of their sum
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[torch.float32])


def test_samples_and_outputs_may_have_two_dtypes(triton_device: str) -> None:
    x_t, output = torch.randn(2, 5, device=triton_device), torch.randn(2, 5, device=triton_device).half()
    result = launch(x_t, output, PLAIN)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, sampler_step_reference(x_t, output, PLAIN))


def test_kernel_takes_any_strides(triton_device: str) -> None:
    x_t = torch.randn(2, 3, 7, 5, device=triton_device).to(memory_format=torch.channels_last)
    output = torch.randn(4, 3, 5, 7, device=triton_device).mT
    seeds = pack_seeds([1, 0, 2, 0], triton_device)[::2]
    assert not any(tensor.is_contiguous() for tensor in (x_t, output, seeds))
    for result in (launch(x_t, output, EVERY, seeds, 1), sampler_step(x_t, output, EVERY, seeds, 1)):
        assert result.is_contiguous()
        torch.testing.assert_close(result, sampler_step_reference(x_t, output, EVERY, seeds.contiguous(), 1))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_step_of_nothing_is_nothing(triton_device: str, shape: tuple[int, int]) -> None:
    x_t, seeds = torch.empty(shape, device=triton_device), pack_seeds(range(shape[0]), triton_device)
    for step in (launch, sampler_step):
        assert step(x_t, torch.cat([x_t, x_t]), EVERY, seeds, 1).shape == shape


def test_halves_are_computed_in_float32(device: str) -> None:
    """60,000 twice is beyond float16's range, 60,000 twice less 60,000 is not."""
    x_t = torch.full((1, 8), 60_000.0, device=device, dtype=torch.float16)
    torch.testing.assert_close(sampler_step(x_t, x_t, Coefficients(2.0, -1.0)), x_t)


def test_a_step_leaves_no_graph(device: str) -> None:
    x_t = torch.randn(2, 9, device=device, requires_grad=True)
    assert not sampler_step(x_t, x_t, PLAIN).requires_grad


def test_an_output_of_the_wrong_batch_is_refused(device: str) -> None:
    x_t = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"a network output of shape \(4, 3\): got \(2, 3\)"):
        sampler_step(x_t, x_t, EVERY, pack_seeds([1, 2], device))


def test_noise_without_seeds_is_refused(device: str) -> None:
    x_t = torch.zeros(2, 3, device=device)
    for seeds in (None, pack_seeds([1], device)):
        with pytest.raises(ValueError, match="this step draws noise: give 2 seeds"):
            sampler_step(x_t, x_t, Coefficients(1.0, 1.0, noise=1.0), seeds)


def test_kernel_addresses_more_than_31_bits(triton_device: str) -> None:
    """A sample that starts 2^31 numbers in; one tensor is all four, and what nobody touches costs a CPU no memory."""
    from fewstep.kernels.sampler_step_triton import BLOCK, kernel

    x = torch.empty(2**31 + BLOCK, dtype=torch.float16, device=triton_device)
    x[2**31 :] = 2
    kernel[(3,)](x, x, x, None, x, 1.0, 2.0, 3.0, 0.0, 0, 2**30, 1, BLOCK=BLOCK)
    assert (x[2**31 :] == 12).all()
