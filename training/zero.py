"""DeepSpeed's ZeRO-1 and ZeRO-2 through accelerate: an engine for each phase, which shards its moments and gradients.

An engine clips, steps and clears gradients in the backward pass of an iteration's last micro-batch; weights are whole
on every process. Checkpoints are those of any other run: moments are joined to be written, and cut when they are read.
In one thing the result differs from that of DDP: weight decay also moves parameters that no loss uses.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..runtime.errors import FewstepError, require
from .trainer_config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What torch calls AdamW's."""


def make_zero_accelerator(config: TrainerConfig) -> Any:
    """An `Accelerator` whose engine accumulates and clips as the trainer does; it can have one only.

    Raises:
        FewstepError: DeepSpeed is not installed, has no GPU, or is configured for what it cannot do here.
    """
    accelerate = require("accelerate", "train")
    if not find_spec("deepspeed"):
        raise FewstepError("DeepSpeed is not installed: pip install deepspeed, or launch with --use_fsdp")
    accelerator = accelerate.Accelerator(mixed_precision="no")
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):  # accelerate has passed them over
        raise FewstepError("DeepSpeed needs a GPU for each process: launch without --use_deepspeed")
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = settings["zero_optimization"]
    offloads = [zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")]
    if zero["stage"] not in (1, 2) or offloads != ["none", "none"] or "optimizer" in settings:
        raise FewstepError(
            "DeepSpeed is supported with --zero_stage 1 or 2, without offloading and without an optimiser of its own: "
            "to shard weights too, launch with --use_fsdp --fsdp_version 2"
        )
    if config.precision == "fp16":
        raise FewstepError("DeepSpeed does not go with fp16 here: choose bf16")
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # one of the trainer's batches
        "train_batch_size": config.accumulation * accelerator.num_processes,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.gradient_norm,
    }
    return accelerator


def join_moments(optimizer: Any, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """What torch's optimiser of these parameters gives as its `state_dict`; all processes must call it."""
    utils: Any = import_module("deepspeed.utils")

    plain = optimizer.optimizer.optimizer
    groups = [{**group, "params": list(range(len(parameters)))} for group in plain.state_dict()["param_groups"]]
    state = {}
    for flat in plain.state.values():  # one, or none before the first step
        for index, parameter in enumerate(parameters):
            moments = {name: utils.safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            state[index] = {"step": flat["step"].clone(), **moments}
    return {"state": state, "param_groups": groups}


def cut_moments(optimizer: Any, parameters: Sequence[nn.Parameter], saved: Mapping[str, Any]) -> None:
    """Go on from the weights as they are, and from moments as `join_moments` or torch's optimiser gave them."""
    utils: Any = import_module("deepspeed.utils")

    zero, plain = optimizer.optimizer, optimizer.optimizer.optimizer
    zero.refresh_fp32_params()
    plain.state.clear()
    for flat in plain.param_groups[0]["params"] if saved["state"] else ():
        step = next(iter(saved["state"].values()))["step"]
        plain.state[flat] = {"step": step.to(flat.device)} | {name: torch.zeros_like(flat) for name in MOMENTS}
        zero._hp_optimizer_states_linked = False  # as before the first step, after which it makes the link by itself
        zero._lazy_init_hp_params_optimizer_state()
    for index, moments in saved["state"].items():
        for name in MOMENTS:
            value = moments[name].to(parameters[index].device)
            utils.safe_set_full_optimizer_state(parameters[index], value, name)


def release_engine(engine: Any, module: nn.Module) -> None:
    """Take an engine's hooks off the module that it has trained, and its weights out of the engine's buffer."""
    engine.destroy()
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
