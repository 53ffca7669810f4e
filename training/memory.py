"""How much memory a training takes: its peak, and what each phase's activations hold until the backward pass."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..runtime.errors import FewstepError

MEGABYTE = 2**20


@contextmanager
def activation_memory(module: nn.Module) -> Iterator[Callable[[], float]]:
    """Measure what the block's forward pass keeps for the backward pass, without the parameters of `module`.

    Yields:
        A function that gives the sum so far (MiB), each storage counted once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        # The tensor may be the result of the node that saves it: a cycle, never freed where no backward comes by.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(sizes.values()) / MEGABYTE


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has held so far: on `device` if it is a GPU, else resident (MiB)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / MEGABYTE, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute activations in the backward pass instead of keeping them, in each diffusers network inside `module`.

    Raises:
        FewstepError: there is none that can.
    """
    networks = [part for part in module.modules() if getattr(part, "_supports_gradient_checkpointing", False)]
    if not networks:
        raise FewstepError(f"{type(module).__name__} cannot recompute activations: set gradient-checkpointing to false")
    for network in networks:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
