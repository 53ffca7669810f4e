"""Where accelerate meets the trainer: one module a phase, so that DDP, FSDP and ZeRO see every use of its parameters.

The losses call their networks through closures, by whatever method they like. So not the networks are prepared but
`PhaseModule`, whose forward is the whole loss. FSDP (version 2) shards weights, gradients, moments and averages of each
phase as one group, which is gathered while any phase computes; DeepSpeed's part is in `zero.py`.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic

from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..runtime.errors import FewstepError, require
from .numerics import autocast
from .phase import Batch, Draws, Loss, Phase
from .trainer_config import TrainerConfig
from .zero import cut_moments, join_moments, make_zero_accelerator, release_engine


class PhaseModule(nn.Module, Generic[Batch]):
    """A phase's loss as the forward of one module that owns its parameters."""

    def __init__(self, phase: Phase[Batch], device: str, precision: str) -> None:
        super().__init__()
        self.trained, self.loss = phase.module, phase.loss
        self.device, self.precision = device, precision

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        """The loss, and what is logged, which carries no gradient."""
        with autocast(self.device, self.precision):  # DeepSpeed's engines would switch off one around them
            loss, logged = self.loss(batch, draws)
        return loss, {name: value.detach() for name, value in logged.items()}


def make_accelerator(module: nn.Module, config: TrainerConfig) -> Any:
    """The `Accelerator` of this process, on the device of `module`, as `accelerate launch` configured it.

    Raises:
        FewstepError: the configuration asks for what several networks with optimisers of their own cannot have.
    """
    accelerate = require("accelerate", "train")
    if _switched_on("ACCELERATE_USE_DEEPSPEED"):
        return make_zero_accelerator(config)
    on_cpu = next(module.parameters()).device.type == "cpu"
    # A loss need not use every parameter (a network's input for the guidance scale, say).
    ddp = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    # Its autocast allows a process one precision in its whole life, so the trainer has its own.
    accelerator = accelerate.Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[ddp])
    accelerator.gradient_accumulation_steps = config.accumulation
    kind = accelerator.distributed_type
    if _switched_on("ACCELERATE_USE_FSDP") and kind != accelerate.DistributedType.FSDP:
        raise FewstepError("FSDP needs two or more GPUs: launch without --use_fsdp")
    if kind == accelerate.DistributedType.FSDP and not accelerator.is_fsdp2:
        raise FewstepError("FSDP is supported in its second version only: launch with --fsdp_version 2")
    if kind == accelerate.DistributedType.FSDP and config.precision == "fp16":
        raise FewstepError("FSDP does not go with fp16 here: choose bf16")
    return accelerator


def prepare(accelerator: Any, phase: Phase[Batch], optimizer: Any, precision: str) -> tuple[Any, Any]:
    """The phase's module and its optimiser, ready for any number of processes.

    Raises:
        FewstepError: accelerate is configured to shard parts of a network by themselves.
    """
    module, optimizer = accelerator.prepare(PhaseModule(phase, accelerator.device.type, precision), optimizer)
    if any(isinstance(part, FSDPModule) for part in phase.module.modules()):
        raise FewstepError("each phase is sharded as a whole: launch with --fsdp_auto_wrap_policy NO_WRAP")
    return module, optimizer


def is_main_process() -> bool:
    """Whether this process, of all that were launched together, is the one that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def end_process() -> None:
    """End this process at once, if it was launched with others and has succeeded.

    Gloo's threads let go of their last tensors whenever they come to it. Once the interpreter has begun to end, that
    aborts the process, whose exit status then says that a finished training failed (pytorch/pytorch#179291); FSDP's
    caches keep those threads alive even after the group is destroyed. So the interpreter does not end here, it stops.
    After a failure others may still wait for this process: then this must not be called.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let prepared modules hold all of their weights for a while; only FSDP has anything to do."""
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def release(prepared: Any, module: nn.Module) -> None:
    """Give a module that DeepSpeed's engine or FSDP has trained its own whole weights again, for good."""
    if _switched_on("ACCELERATE_USE_DEEPSPEED"):
        release_engine(prepared, module)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                setattr(part, name, nn.Parameter(whole(parameter), parameter.requires_grad))
                part._state_dict_pre_hooks.clear()  # FSDP's, which would shard them once more
                part._load_state_dict_pre_hooks.clear()


def optimizer_state(optimizer: Any, module: nn.Module) -> dict[str, Any]:
    """A prepared optimiser's `state_dict` with all of its moments; all processes must call it."""
    if _switched_on("ACCELERATE_USE_DEEPSPEED"):
        return join_moments(optimizer, list(module.parameters()))
    state = optimizer.state_dict()
    return {**state, "state": whole(state["state"])}


def load_optimizer_state(optimizer: Any, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Go on from what `optimizer_state` gave, after the module's weights have been loaded.

    Raises:
        ValueError: the optimiser has other parameters.
    """
    parameters = list(module.parameters())
    if _switched_on("ACCELERATE_USE_DEEPSPEED"):
        cut_moments(optimizer, parameters, state)
        return
    moments = {
        index: {name: sharded_like(parameters[index], value) for name, value in each.items()}
        for index, each in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def whole(value: Any) -> Any:
    """All of a tensor, or of every tensor in a nested mapping, that FSDP may have sharded; detached."""
    if isinstance(value, Mapping):
        return {name: whole(each) for name, each in value.items()}
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    return value.detach() if isinstance(value, Tensor) else value


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, which is all of it without FSDP."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(example: Tensor, value: Tensor) -> Tensor:
    """`value` sharded as `example`, if that is sharded and has the same shape."""
    if not isinstance(example, DTensor) or example.shape != value.shape:
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
