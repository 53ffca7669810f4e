"""What tests of whole methods on points (B, 2) share: batches of data, training every stage, a distance."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fewstep.runtime.denoiser import Condition, Denoiser, DenoiserLike, initial_scale
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import EDM, VP, Flow, Schedule, Trig
from fewstep.training.batches import ConditionedBatch
from fewstep.training.method import Copy, Stage, Task
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES: Mapping[str, Schedule] = {
    "vp": VP(DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod),
    "vp-zero-terminal": VP(DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True).alphas_cumprod),
    "flow": Flow(),
    "flow-shift-3": Flow(shift=3.0),
    "edm": EDM(),
    "trig": Trig(),
}
"""Of every kind of teacher; the fixture `schedule` is each in turn."""
TRAINER = TrainerConfig(
    warmup=20, precision="no", weight_decay=0, ema_decay=0.99, decay=0.5, log_every=1000, checkpoint_minutes=100
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_data(task: Task, sample: Callable[[int, torch.Generator], Tensor], size: int = 128) -> Task:
    """The task with batches of `sample(count, generator)`."""

    def batches(step: int, phase: int) -> ConditionedBatch:
        return ConditionedBatch(sample(size, seeded(1000 * step + phase)), {})

    return replace(task, batches=batches)


def on_process(task: Task, teacher: DenoiserLike, prediction: str) -> Task:
    """The task with a teacher of another process, and fresh networks of its prediction type as copies."""

    def copy(name: str, embed_guidance: bool = False) -> Copy:
        module = task.copy(name).module

        def network(x: Tensor, network_time: Tensor, condition: Condition) -> Tensor:
            # EDM's `ln(sigma) / 4` is of the order of 1; the points' network expects times of the order of 1000.
            scaled = 1000 * network_time if isinstance(teacher.schedule, EDM) else network_time
            output: Tensor = module(x, scaled, condition)
            return output

        return Copy(module, Denoiser(network, teacher.schedule, prediction), module)

    return replace(task, teacher=InFloat32(teacher), copy=copy)


@dataclass(frozen=True)
class InFloat32:
    """An analytic teacher that keeps the dtype of `x_t`, as networks do."""

    teacher: DenoiserLike

    @property
    def schedule(self) -> Schedule:
        return self.teacher.schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher(x_t, t, condition).to(x_t)


@dataclass(frozen=True)
class Free:
    """Predicts `x_0` whatever it is shown: a student whose outputs are free numbers."""

    x_0: Tensor
    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.x_0


def train_stages(task: Task, stages: Iterator[Stage], iterations: int) -> Iterator[Stage]:
    """Train each stage for `iterations` before the next is asked for, as the driver does; give it when it is done."""
    for stage in stages:
        config = replace(TRAINER, iterations=iterations)
        train(stage.phases, task.batches, stage.student.module, config, task.folder / stage.name)
        yield stage


def samples(stage: Stage, count: int = 4000) -> Tensor:
    """(count, 2) of the stage's student, by its own sampler and times."""
    return sample(stage.student.denoiser, stage.sampler, stage.times, count)


def sample(denoiser: DenoiserLike, sampler: str, times: Sequence[float], count: int = 4000) -> Tensor:
    """(count, 2), always from the same noise."""
    noise = torch.randn(len(times), count, 2, generator=seeded(5))
    x_T = initial_scale(denoiser.schedule, times[0]) * noise[0]
    with torch.no_grad():
        return get_sampler(sampler).function(denoiser, x_T, times, {}, lambda k: noise[k])


def sliced_distance(left: Tensor, right: Tensor) -> float:
    """Sliced Wasserstein-1 distance of two sets of points, over 64 directions."""
    directions = nn.functional.normalize(torch.randn(2, 64, generator=seeded()), dim=0)
    return float(((left @ directions).sort(0).values - (right @ directions).sort(0).values).abs().mean())
