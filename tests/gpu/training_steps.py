"""The trainer on the built-in networks, with kernels and without: speed, memory, and the curves of the losses."""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

from fewstep.kernels.benchmarks.report import Measurement, Report, Row
from fewstep.kernels.dispatch import without_kernels
from fewstep.kernels.patch import apply
from fewstep.runtime.families import Model, sana
from fewstep.runtime.schedule import Flow
from fewstep.training.autoencoder import AutoencoderConfig, build_autoencoder
from fewstep.training.batches import ConditionedBatch
from fewstep.training.copies import FullCopies
from fewstep.training.flow_matching import FlowMatchingConfig, flow_matching_phase
from fewstep.training.method import Task
from fewstep.training.methods import dmd2
from fewstep.training.phase import Phase
from fewstep.training.recorder import read_curve
from fewstep.training.teacher import TeacherConfig, build_teacher
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig

BUILT_IN, SIZE, TOKENS = TeacherConfig(), 8, 24


class Clock:
    """The same batch for every phase of every iteration; notes when the timed iterations begin and end."""

    def __init__(self, batch: ConditionedBatch, warm_up: int, iterations: int) -> None:
        self.batch, self.first, self.last = batch, warm_up, warm_up + iterations
        self.marks: dict[int, float] = {}

    def __call__(self, step: int, phase: int) -> ConditionedBatch:
        if phase == 0 and step in (self.first, self.last):
            if self.batch.x_0.is_cuda:
                torch.cuda.synchronize()
            self.marks[step] = time.perf_counter()
        return self.batch

    @property
    def iterations_per_second(self) -> float:
        return (self.last - self.first) / (self.marks[self.last] - self.marks[self.first])


def training(
    method: str,
    batch: int,
    kernels: bool,
    device: torch.device,
    network: TeacherConfig = BUILT_IN,
    precision: str = "bf16",
    warm_up: int = 20,
    iterations: int = 160,
) -> Row:
    """Train on latents that are there already, from the same weights with the same draws each time.

    Args:
        method: `flow matching` (the teacher) or `dmd2` (with its defaults).
        batch: latents of each phase.
        kernels: whether operations and the network's layers may be kernels.
        device: where to train.
        network: shape of the teacher.
        precision: as the trainer's.
        warm_up: iterations before the clock runs.
        iterations: while it runs.
    """
    torch.manual_seed(0)
    clock = Clock(random_batch(batch, device), warm_up, iterations)
    config = TrainerConfig(
        iterations=clock.last + 1, precision=precision, checkpoint_minutes=60, log_every=max(1, iterations // 20)
    )
    model = random_model(network, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, nullcontext() if kernels else without_kernels():
        sites = apply(model.network) if kernels else {}
        phases, exported = prepare(method, model, clock, Path(folder))
        train(phases, clock, exported, config, Path(folder))
        curve = read_curve(Path(folder))
    speed = clock.iterations_per_second
    row: Row = {"method": method, "batch": batch, "precision": precision, "kernels": kernels, "layers": sites}
    row |= {"iterations_per_second": round(speed, 2), "images_per_second": round(speed * batch, 1)}
    row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else None
    return {**row, "curve": curve}


def prepare(method: str, model: Model, clock: Clock, folder: Path) -> tuple[list[Phase[ConditionedBatch]], nn.Module]:
    """A method's phases, and the module that it trains towards the result."""
    negative = {name: value[:1] for name, value in clock.batch.condition.items()}
    if method == "flow matching":
        network = model.network.train()
        return [flow_matching_phase(network, model.denoiser, negative, FlowMatchingConfig())], network
    model.network.eval().requires_grad_(False)
    task = Task(
        teacher=model.denoiser,
        negative=negative,
        guidance=3.0,
        steps=1,
        sample_shape=model.sample_shape,
        batches=clock,
        copy=FullCopies(model, sana),
        feature_block=sana.feature_block,
        decoder=model.decoder,
        folder=folder,
        device=clock.batch.x_0.device,
    )
    (stage,) = dmd2.stages(task, dmd2.Config())
    return stage.phases, stage.student.module


def random_model(network: TeacherConfig, device: torch.device) -> Model:
    """A network with the built-in autoencoder."""
    shape = AutoencoderConfig()
    transformer = build_teacher(network, shape.latent_channels, SIZE).to(device)
    return sana.assemble(transformer, build_autoencoder(shape).to(device), Flow(), "flow_prediction")


def random_batch(size: int, device: torch.device) -> ConditionedBatch:
    """Latents, and the text states of as many prompts."""
    states = torch.randn(size, TOKENS, 384, device=device)
    mask = torch.ones(size, TOKENS, dtype=torch.long, device=device)
    x_0 = torch.randn(size, AutoencoderConfig().latent_channels, SIZE, SIZE, device=device)
    return ConditionedBatch(x_0, {"encoder_hidden_states": states, "encoder_attention_mask": mask})


def measurements(device: torch.device, batches: Sequence[int] = (16, 256), **sizes: object) -> Iterator[Measurement]:
    """DMD2 first; `sizes` are further arguments of `training`."""
    for method, batch, kernels in product(("dmd2", "flow matching"), batches, (False, True)):
        name = f"{method}, batch {batch}, {'with' if kernels else 'without'} kernels"
        yield name, partial(_rows, method, batch, kernels, device, sizes)


def _rows(method: str, batch: int, kernels: bool, device: torch.device, sizes: Mapping[str, object]) -> list[Row]:
    return [training(method, batch, kernels, device, **sizes)]


def main(arguments: Sequence[str]) -> None:
    """Measure on the GPU into a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="receives the numbers")
    parser.add_argument("--seconds", type=float, default=300, help="no training is begun later than this")
    given = parser.parse_args(arguments)
    Report(given.out, given.seconds).measure(measurements(torch.device("cuda")))


if __name__ == "__main__":
    main(sys.argv[1:])
