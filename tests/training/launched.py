"""A tiny training, run by tests in processes of its own: `python launched.py FOLDER OPTIONS-AS-JSON`.

A student with dropout follows a critic, the critic follows the data; a moving average of the critic takes part.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.runtime.errors import FewstepError
from fewstep.training.distribution import end_process
from fewstep.training.phase import Average, Draws, Loss, Phase
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig


def batches(step: int, phase: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + phase))


def main(folder: Path, sharded: bool = False, apart: bool = False, dropout: float = 0.1, **options: object) -> None:
    """Train; `student-main.pt` and `student-other.pt` hold what the processes are left with.

    Processes that are `apart` share no disk.
    """
    if apart:
        folder = folder / os.environ["RANK"] if os.environ["RANK"] != "0" else folder
    torch.manual_seed(0)
    student, critic = nn.Sequential(nn.Linear(6, 6), nn.Dropout(dropout)), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    slow = copy.deepcopy(critic).requires_grad_(False)
    critic.register_module("unused", nn.Linear(2, 2))
    slow.register_module("unused", nn.Linear(2, 2))
    slow.unused.load_state_dict(critic.unused.state_dict())

    def critic_loss(batch: Tensor, draws: Draws) -> Loss:
        noised = batch + torch.randn(batch.shape, generator=draws.own)
        output = critic[1](critic[0](noised))
        return (output - batch).pow(2).mean(), {"score": output.mean()}

    def student_loss(batch: Tensor, draws: Draws) -> Loss:
        sample = student(torch.randn(batch.shape, generator=draws.own))
        judged = critic[1](critic[0](sample)) - slow[0](batch)
        return judged.pow(2).mean() * (1 + torch.rand((), generator=draws.shared)), {}

    phases = [Phase("critic", critic, critic_loss, 1e-2), Phase("student", student, student_loss, 3e-3, every=2)]
    settings = {
        "iterations": 8,
        "warmup": 2,
        "decay": 0.0,
        "precision": "no",
        "checkpoint_minutes": 100,
        "log_every": 2,
        **options,
    }
    if sharded:
        shard_on_cpu()
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        zero_on_cpu()
    shown: list[int] = []  # on the main process only

    def show(step: int) -> list[Path]:
        shown.append(step)
        return []

    averages = [Average(slow, critic, 0.9)]
    train(phases, batches, student, TrainerConfig(**settings), folder, show, averages)  # type: ignore[arg-type]
    torch.save(student.state_dict(), folder / f"student-{'main' if shown else 'other'}.pt")


def shard_on_cpu() -> None:
    """Accelerate shards on accelerators only; this lets it do so here, to test the trainer's side of it."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    Accelerator(cpu=True)
    shared = {
        "distributed_type": DistributedType.FSDP,
        "fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False),
    }
    PartialState._shared_state.update(shared)
    AcceleratorState._shared_state.update(shared)


def zero_on_cpu() -> None:
    """Accelerate gives DeepSpeed accelerators only; this lets it have CPUs."""
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
    from accelerate.state import AcceleratorState, PartialState

    Accelerator(cpu=True)
    plugin = DeepSpeedPlugin()
    plugin.select(_from_accelerator_state=True)
    PartialState._shared_state.update(distributed_type=DistributedType.DEEPSPEED)
    AcceleratorState._shared_state.update(distributed_type=DistributedType.DEEPSPEED, deepspeed_plugins=plugin)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
        end_process()
    except FewstepError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
