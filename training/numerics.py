"""How numbers are computed in training: precision, attention, and the randomness of each step."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..runtime.errors import FewstepError
from .phase import Draws

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What forward passes compute in; weights, gradients and moments are float32 throughout."""


def autocast(device: str, precision: str) -> torch.autocast:
    """Mixed precision by name, for forward passes."""
    return torch.autocast(device, PRECISIONS[precision], enabled=precision != "no")


def attention_for(device: str) -> AbstractContextManager[None]:
    """The fastest attention for training, forward and backward (which may compute the forward pass again)."""
    # On CPU the fused attention's backward is several times slower than the plain one; on CUDA torch chooses.
    return sdpa_kernel([SDPBackend.MATH]) if device == "cpu" else nullcontext()


def step_draws(seed: int, step: int, phase: int, device: torch.device, shard: int = 0, shards: int = 1) -> Draws:
    """The randomness of one shard of one phase of one iteration; the same arguments give the same numbers.

    Args:
        seed: of the run.
        step: iteration, from 0.
        phase: its place in the iteration, 0 to 15.
        device: of the noise.
        shard: which piece of the global batch: process * accumulation + micro-batch.
        shards: how many there are.
    """
    own = torch.Generator(device).manual_seed(_number(seed, step * shards + shard, phase))
    shared = torch.Generator().manual_seed(~_number(seed, step, phase) & 0x7FFF_FFFF_FFFF_FFFF)
    return Draws(own, shared)


def seed_layers(seed: int, position: int, phase: int, device: torch.device) -> None:
    """Fix what layers draw by themselves (dropout): torch's own generators, apart from a step's `Draws`."""
    number = _number(seed, position, phase) ^ 0x5EED_5EED
    torch.default_generator.manual_seed(number)  # torch.manual_seed would import the compiler, and visit every device
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _number(seed: int, position: int, phase: int) -> int:
    return (seed * 1_000_003 + position) * 16 + phase


def all_finite(value: Any) -> bool:
    """Whether no tensor in `value` (a tensor, or dataclasses, mappings and sequences of them) holds NaN or infinity."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if is_dataclass(value):
        return all(all_finite(getattr(value, each.name)) for each in fields(value))
    if isinstance(value, Mapping):
        return all(map(all_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(all_finite, value))


def training_device(name: str, threads: int = 0) -> torch.device:
    """The device to train on: `cpu`, `cuda`, or `auto` for CUDA where there is one; and the number of CPU threads.

    Of several processes on one machine, each has its own GPU.

    Raises:
        FewstepError: the device is unknown or absent.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise FewstepError(f"there is no device {name!r} here: use --device cpu")
    rank = os.environ.get("LOCAL_RANK")
    return torch.device(name, int(rank)) if name == "cuda" and rank else torch.device(name)
