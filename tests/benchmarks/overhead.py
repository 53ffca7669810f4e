"""What the trainer costs beside a plain loop with the same network calls: the time of an iteration, and peak memory.

Both train the built-in network on the same random latents, in turns: a block of the one's iterations, a block of the
other's, so that whatever else the machine does slows both; on CPU the clock is the main thread's own. Memory is that of
processes which run one of them alone. The trainer does all that it does in `fewstep train`: curve, TensorBoard,
progress, watchdog; checkpoints are minutes apart and fall outside the blocks.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from fewstep.app.machine import machine
from fewstep.runtime.denoiser import Condition
from fewstep.runtime.families import Model, sana
from fewstep.runtime.files import write_json
from fewstep.runtime.schedule import Flow
from fewstep.training.autoencoder import AutoencoderConfig, build_autoencoder
from fewstep.training.batches import ConditionedBatch
from fewstep.training.collapse import WatchdogConfig
from fewstep.training.copies import FullCopies
from fewstep.training.distribution_matching import FeatureHead
from fewstep.training.memory import peak_memory
from fewstep.training.method import Task
from fewstep.training.methods import get_method
from fewstep.training.numerics import attention_for, autocast, training_device
from fewstep.training.recipe import StudentRecipe
from fewstep.training.teacher import TeacherConfig, build_teacher
from fewstep.training.trainer import Batches, train
from fewstep.training.watchdog import watch_stage

BUILT_IN, SIZE, TOKENS, GUIDANCE = TeacherConfig(), 8, 24, 3.0
RATE, LARGEST_NORM, DECAY = 1e-4, 1.0, 0.995


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Args:
        device: where both train.
        precision: the trainer's word for it.
        batch: latents of each phase.
        iterations: in a block; even, so that each holds as many turns of DMD2's student.
        blocks: that are timed, after one that is not.
        network: shape of all networks.
    """

    device: torch.device
    precision: str = "bf16"
    batch: int = 16
    iterations: int = 20
    blocks: int = 10
    network: TeacherConfig = BUILT_IN


class InTurns:
    """Gives the trainer its batches, and lets the plain loop run between two blocks of the trainer's iterations."""

    def __init__(self, setup: Setup, batch: ConditionedBatch, plain: Callable[[], None]) -> None:
        self.setup, self.batch, self.plain = setup, batch, plain
        self.last = setup.iterations * (setup.blocks + 1)
        self.marks: list[float] = []

    def __call__(self, step: int, phase: int) -> ConditionedBatch:
        if phase == 0 and step % self.setup.iterations == 0:
            self._mark()
            for _ in range(self.setup.iterations if step < self.last else 0):
                self.plain()
            self._mark()
        return self.batch

    def _mark(self) -> None:
        if self.batch.x_0.is_cuda:
            torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
        else:  # what other programs take from the processor does not count
            self.marks.append(time.thread_time())

    def seconds(self) -> tuple[list[float], list[float]]:
        """Of each timed block: the trainer's, and the plain loop's before it."""
        laps = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return laps[3::2], laps[2:-1:2]


def compare_time(method: str, setup: Setup) -> dict[str, Any]:
    """Milliseconds of an iteration (medians), and the median, over pairs of blocks, of their ratio."""
    batch = random_batch(setup)
    turns = InTurns(setup, batch, PLAIN[method](random_model(setup).network, batch, setup))
    run_trainer(method, setup, turns, batch, turns.last + 1)
    ours, floor = turns.seconds()
    ratios = [one / other for one, other in zip(ours, floor, strict=True)]
    milliseconds = [round(1000 * statistics.median(each) / setup.iterations, 2) for each in (ours, floor)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "trainer_milliseconds": milliseconds[0],
        "plain_milliseconds": milliseconds[1],
    }


def run_alone(side: str, method: str, setup: Setup) -> float:
    """Peak memory (MiB) of this process after one block of one side."""
    batch = random_batch(setup)
    if side == "trainer":
        run_trainer(method, setup, lambda step, phase: batch, batch, setup.iterations)
    else:
        iteration = PLAIN[method](random_model(setup).network, batch, setup)
        for _ in range(setup.iterations):
            iteration()
    return peak_memory(setup.device)


def run_trainer(
    method: str, setup: Setup, batches: Batches[ConditionedBatch], batch: ConditionedBatch, iterations: int
) -> None:
    """Train as `fewstep train METHOD` does by default, in a folder that is thrown away."""
    model, module = random_model(setup), get_method(method)
    config = replace(StudentRecipe(method=None).trainer, minutes=0, iterations=iterations, precision=setup.precision)
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            teacher=model.denoiser,
            negative=first_of(batch.condition),
            guidance=GUIDANCE,
            steps=1,
            sample_shape=model.sample_shape,
            batches=lambda step, phase: batch,
            copy=FullCopies(model, sana),
            feature_block=sana.feature_block,
            decoder=model.decoder,
            folder=Path(folder),
            device=setup.device,
        )
        (stage,) = module.stages(task, module.Config())
        watch = watch_stage(WatchdogConfig(), stage, task)
        train(stage.phases, batches, stage.student.module, config, task.folder, averages=stage.averages, watch=watch)


def plain_dmd2(teacher: nn.Module, batch: ConditionedBatch, setup: Setup) -> Callable[[], None]:
    """One iteration of DMD2 written out, for a flow: `x_t = (1 - t) x_0 + t eps`, `v = eps - x_0`."""
    x_0, condition, negative = batch.x_0, batch.condition, first_of(batch.condition)
    student, fake = copy.deepcopy(teacher).train(), copy.deepcopy(teacher).train()
    block, channels = sana.feature_block(fake)
    judges = nn.ModuleDict({"fake": fake, "head": FeatureHead(channels).to(setup.device)})
    features: list[Tensor] = []
    block.register_forward_hook(lambda _, __, output: features.append(output))
    train_judges, train_student = Descent(judges, (0.0, 0.99)), Descent(student, (0.0, 0.99))
    average, noisiest = averaged(student), torch.ones(setup.batch, device=setup.device)

    def noised(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = 0.02 + 0.96 * torch.rand(len(clean), device=setup.device)
        eps = torch.randn_like(clean)
        return t, eps, torch.lerp(clean, eps, along(t))

    def sample() -> Tensor:
        noise = torch.randn_like(x_0)
        return noise - velocity(student, noise, noisiest, condition)

    def judges_loss() -> Tensor:
        with torch.no_grad():
            x = sample()
        both = torch.cat([x, x_0])
        t, eps, x_t = noised(both)
        v = velocity(fake, x_t, t, {name: torch.cat([value, value]) for name, value in condition.items()})
        on_fake, on_real = judges["head"](features.pop()).float().chunk(2)
        adversarial = functional.softplus(on_fake).mean() + functional.softplus(-on_real).mean()
        return functional.mse_loss(v[: len(x)], (eps - both)[: len(x)]) + 1e-2 * adversarial

    def student_loss() -> Tensor:
        x = sample()
        t, _, x_t = noised(x)
        mu_fake = x_t - along(t) * velocity(fake, x_t, t, condition)
        adversarial = functional.softplus(-judges["head"](features.pop()).float()).mean()
        with torch.no_grad():
            mu_real = x_t - along(t) * guided_velocity(teacher, x_t, t, condition, negative)
            gradient = (mu_fake - mu_real) / (x - mu_real).abs().mean((1, 2, 3), keepdim=True)
        return 0.5 * functional.mse_loss(x, (x - gradient).detach()) + 3e-3 * adversarial

    steps = count()

    def iteration() -> None:
        with attention_for(setup.device.type):
            train_judges(judges_loss, setup)
            if next(steps) % 2 == 0:
                judges.requires_grad_(False)
                train_student(student_loss, setup)
                judges.requires_grad_(True)
                follow(average, student, DECAY)

    return iteration


def plain_lcm(teacher: nn.Module, batch: ConditionedBatch, setup: Setup) -> Callable[[], None]:
    """One iteration of LCM written out, for a flow."""
    x_0, condition, negative = batch.x_0, batch.condition, first_of(batch.condition)
    student, target = copy.deepcopy(teacher).train(), copy.deepcopy(teacher).train().requires_grad_(False)
    descent, average, slow = Descent(student, (0.9, 0.99)), averaged(student), list(target.parameters())

    def consistency(network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        scaled = 1e4 * along(t)
        total = scaled**2 + 0.25
        prediction = x_t - along(t) * velocity(network, x_t, t, condition)
        return torch.where(scaled == 0, x_t, 0.25 / total * x_t + scaled * total.rsqrt() * prediction)

    def loss() -> Tensor:
        step = torch.randint(1, 51, (setup.batch,), device=setup.device)
        t, s = step / 50, (step - 1) / 50
        x_t = torch.lerp(x_0, torch.randn_like(x_0), along(t))
        with torch.no_grad():
            x_s = x_t + along(s - t) * guided_velocity(teacher, x_t, t, condition, negative)
        prediction = consistency(student, x_t, t)
        with torch.no_grad():
            aim = consistency(target, x_s, s)
        return ((prediction - aim).pow(2) + 1e-6).sqrt().mean() - 1e-3

    def iteration() -> None:
        with attention_for(setup.device.type):
            descent(loss, setup)
        follow(average, student, DECAY)
        follow(slow, student, 0.95)

    return iteration


PLAIN = {"dmd2": plain_dmd2, "lcm": plain_lcm}


class Descent:
    """One network's AdamW, with clipped gradients."""

    def __init__(self, module: nn.Module, betas: tuple[float, float]) -> None:
        self.parameters = list(module.requires_grad_(True).parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, RATE, betas=betas, weight_decay=0.0, fused=True)

    def __call__(self, loss: Callable[[], Tensor], setup: Setup) -> None:
        with autocast(setup.device.type, setup.precision):
            value = loss()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def averaged(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@torch.no_grad()
def follow(average: Sequence[Tensor], module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average), list(module.parameters()), 1 - decay)


def velocity(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The network's output (B, C, h, w) in float32; t is in [0, 1]."""
    output: Tensor = network(x_t, timestep=1000 * t, return_dict=False, **condition)[0]
    return output.float()


def guided_velocity(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, negative: Condition) -> Tensor:
    both = {name: torch.cat([negative[name].expand_as(value), value]) for name, value in condition.items()}
    without, given = velocity(network, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return without + GUIDANCE * (given - without)


def along(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def first_of(condition: Condition) -> Condition:
    return {name: value[:1] for name, value in condition.items()}


def random_model(setup: Setup) -> Model:
    """A frozen teacher with the built-in autoencoder."""
    shape = AutoencoderConfig()
    network = build_teacher(setup.network, shape.latent_channels, SIZE).to(setup.device).eval().requires_grad_(False)
    return sana.assemble(network, build_autoencoder(shape).to(setup.device), Flow(), "flow_prediction")


def random_batch(setup: Setup) -> ConditionedBatch:
    """Latents, and the text states of as many prompts."""
    x_0 = torch.randn(setup.batch, AutoencoderConfig().latent_channels, SIZE, SIZE, device=setup.device)
    states = torch.randn(setup.batch, TOKENS, 384, device=setup.device)
    mask = torch.ones(setup.batch, TOKENS, dtype=torch.long, device=setup.device)
    return ConditionedBatch(x_0, {"encoder_hidden_states": states, "encoder_attention_mask": mask})


def report(methods: Sequence[str], setup: Setup, peak: Callable[[str, str], float]) -> dict[str, Any]:
    """Both ratios of each method, trainer to plain loop.

    Args:
        methods: keys of `PLAIN`.
        setup: what is measured.
        peak: MiB that `side` (`trainer` or `plain`) of `method` takes: `peak(side, method)`.
    """
    device = torch.cuda.get_device_name() if setup.device.type == "cuda" else "cpu"
    results: dict[str, Any] = {
        "machine": machine(),
        "device": device,
        "precision": setup.precision,
        "batch": setup.batch,
        "blocks": setup.blocks,
        "iterations": setup.iterations,
    }
    # Memory first: a process that a large one starts counts as large.
    memory = {method: (peak("trainer", method), peak("plain", method)) for method in methods}
    for method, (ours, floor) in memory.items():
        mebibytes = {"ratio": round(ours / floor, 4), "trainer_mib": ours, "plain_mib": floor}
        results[method] = {"step_time": compare_time(method, setup), "peak_memory": mebibytes}
    return results


def show(results: dict[str, Any], methods: Sequence[str]) -> None:
    """Print how much more than the plain loop the trainer takes."""
    table = Table(title=f"the trainer beside a plain loop ({results['device']}, batch {results['batch']})")
    for column in ("method", "step time", "peak memory"):
        table.add_column(column)
    for method in methods:
        excess = [100 * (results[method][kind]["ratio"] - 1) for kind in ("step_time", "peak_memory")]
        table.add_row(method, *(f"{each:+.1f} %" for each in excess))
    Console().print(table)


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="receives the numbers")
    parser.add_argument("--methods", nargs="+", choices=PLAIN, default=list(PLAIN))
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--precision", default="bf16", help="no, bf16 or fp16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=20, help="of a block; even")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument(
        "--alone", nargs=2, metavar=("SIDE", "METHOD"), help="print the peak memory of one side, in MiB"
    )
    given = parser.parse_args(arguments)
    setup = Setup(training_device(given.device), given.precision, given.batch, given.iterations, given.blocks)
    if given.alone:
        side, method = given.alone
        print(run_alone(side, method, setup))
        return

    def peak(side: str, method: str) -> float:
        command = [sys.executable, "-P", __file__, *arguments, "--alone", side, method]
        return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]))

    results = report(given.methods, setup, peak)
    show(results, given.methods)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, results)


if __name__ == "__main__":
    main(sys.argv[1:])
