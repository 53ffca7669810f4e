"""Speed of training and generation with the built-in networks, whose weights are random here; prints JSON."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.kernels.benchmark import median_seconds
from fewstep.runtime.engines.torch import TorchEngine
from fewstep.runtime.families import Model, sana
from fewstep.runtime.samplers import get_sampler
from fewstep.runtime.schedule import Flow, uniform_times
from fewstep.runtime.trajectory import Trajectory
from fewstep.training.autoencoder import AutoencoderConfig, build_autoencoder
from fewstep.training.batches import ConditionedBatch
from fewstep.training.copies import FullCopies
from fewstep.training.flow_matching import FlowMatchingConfig, flow_matching_phase
from fewstep.training.method import Task
from fewstep.training.methods import dmd2
from fewstep.training.phase import Phase
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


def training_speed(
    method: str,
    batch: int,
    device: torch.device,
    network: TeacherConfig = BUILT_IN,
    precision: str = "bf16",
    warm_up: int = 20,
    iterations: int = 40,
) -> dict[str, Any]:
    """How fast the trainer itself goes, on latents that are there already.

    Args:
        method: `flow matching` (the teacher) or `dmd2` (with its defaults).
        batch: latents of each phase.
        device: where to train.
        network: shape of the teacher.
        precision: as the trainer's.
        warm_up: iterations before the clock runs.
        iterations: while it runs.
    """
    clock = Clock(random_batch(batch, device), warm_up, iterations)
    config = TrainerConfig(iterations=clock.last + 1, precision=precision, checkpoint_minutes=60)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        phases, exported = prepare(method, random_model(network, device), clock, Path(folder))
        train(phases, clock, exported, config, Path(folder))
    speed = clock.iterations_per_second
    row = {"method": method, "batch": batch, "precision": precision, "iterations_per_second": round(speed, 2)}
    row["images_per_second"] = round(speed * batch, 1)
    row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else None
    return row


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


def latency(
    steps: int, batch: int, device: torch.device, network: TeacherConfig = BUILT_IN, repeats: int = 100
) -> dict[str, Any]:
    """From noise and text states to pictures, which all lie on the CPU: the torch engine, eager, in float32."""
    model = random_model(network, device)
    trajectory = Trajectory(model, get_sampler("consistency"), uniform_times(steps))
    engine = TorchEngine(trajectory, device)
    condition = random_batch(batch, torch.device("cpu")).condition
    arrays = {name: value.numpy() for name, value in condition.items()}
    arrays["noise"] = torch.randn(batch, trajectory.draws, *model.sample_shape).numpy()
    # Pictures come back to the CPU, so the clock on the wall is right.
    seconds = median_seconds(lambda: engine(**arrays), torch.device("cpu"), repeats)
    row = {"engine": "torch", "steps": steps, "batch": batch, "milliseconds": round(1000 * seconds, 3)}
    return {**row, "images_per_second": round(batch / seconds, 1)}


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


def measurements(device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch in (16, 256):
        for method in ("flow matching", "dmd2"):
            yield "training", training_speed(method, batch, device)
    for steps in (1, 4):
        for batch in (1, 16):
            yield "latency", latency(steps, batch, device)


def main() -> None:
    """Print all measurements, each also on its way for who is watching."""
    found: dict[str, list[dict[str, Any]]] = {}
    for section, row in measurements(torch.device("cuda")):
        print(section, row, file=sys.stderr, flush=True)
        found.setdefault(section, []).append(row)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
