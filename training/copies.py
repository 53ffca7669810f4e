"""Trainable copies of a teacher: with weights of their own, or low-rank adapters on the frozen teacher (LoRA)."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..runtime.errors import FewstepError, require
from ..runtime.families import Model
from .method import Copy

ADAPTED = ("attn", "attn1", "attn2", "ff", "ff_context")
"""What diffusers calls attention and feed-forward modules; every layer inside them gets an adapter."""


@dataclass(frozen=True)
class FullCopies:
    """Copies with weights of their own.

    Args:
        model: the teacher.
        family: its file in `runtime.families`.
    """

    model: Model
    family: ModuleType

    def __call__(self, name: str, embed_guidance: bool = False) -> Copy:
        """See `CopyMaker`."""
        network = self.family.with_guidance_input(self.model.network) if embed_guidance else self.model.network
        network = copy.deepcopy(network).train().requires_grad_(True)
        return Copy(network, replace(self.model.denoiser, network=self.family.network_call(network)), network)


@dataclass(frozen=True)
class LoRACopies:
    """Copies that add low-rank adapters to the teacher's frozen weights, which all share (LoRA, arXiv 2106.09685).

    Each copy is a tree of modules of its own around the same weights, so that no call has to switch adapters and the
    teacher stays as it was. All linear and plain convolution layers of attention and feed-forward get an adapter,
    `W + B A` with B = 0 at first.

    Args:
        model: the teacher.
        family: its file in `runtime.families`.
        rank: of A and B, at least 1.
    """

    model: Model
    family: ModuleType
    rank: int

    def __call__(self, name: str, embed_guidance: bool = False) -> Copy:
        """See `CopyMaker`.

        Raises:
            FewstepError: a guidance input is asked for, the rank is below 1, or the network has no layer to adapt.
        """
        if embed_guidance:
            raise FewstepError(
                "adapters cannot add an input for the guidance scale: distil for one scale, or with lora_rank 0"
            )
        if self.rank < 1:
            raise FewstepError(f"lora_rank {self.rank} is not possible: give 1 or more, or 0 to train all weights")
        peft = require("peft", "train")
        network = _sharing_weights(self.model.network)
        layers = _adapted_layers(network)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=layers), network, name
        )
        denoiser = replace(self.model.denoiser, network=self.family.network_call(network.train()))
        return Copy(Adapter(network, layers, name), denoiser, network)


class Adapter(nn.ModuleDict):
    """The factors of one adapter, by the path of the layer that they adapt, with `/` for the dots.

    Args:
        network: holds them.
        layers: paths of the adapted layers.
        name: of the adapter.
    """

    def __init__(self, network: Any, layers: list[str], name: str) -> None:
        found = {path.replace(".", "/"): network.get_submodule(path) for path in layers}
        super().__init__(
            {
                path: nn.ModuleDict({"lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]})
                for path, layer in found.items()
            }
        )
        # Activations are those of the whole network; a function, since a bound method would be copied with the network.
        self._supports_gradient_checkpointing = getattr(network, "_supports_gradient_checkpointing", False)
        self.enable_gradient_checkpointing = lambda: network.enable_gradient_checkpointing()


def merged(trained: Copy) -> nn.Module:
    """The trained network as an ordinary diffusers module: adapters are added into a copy of the weights they adapt."""
    if trained.module is trained.network:
        return trained.network
    network: Any = copy.deepcopy(trained.network)
    for path, _ in trained.module.named_children():
        layer = network.get_submodule(path.replace("/", "."))
        layer.merge(safe_merge=True)
        network.set_submodule(path.replace("/", "."), layer.get_base_layer())
    del network.peft_config
    merged_network: nn.Module = network
    return merged_network


def save_adapter(trained: Copy, folder: Path) -> None:
    """Write a low-rank copy's adapter alone, as diffusers' `pipeline.load_lora_weights(folder)` reads it."""
    part = "unet" if type(trained.network).__name__.startswith("UNet") else "transformer"
    weights = {f"{part}.{name.replace('/', '.')}": value for name, value in trained.module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})


def _sharing_weights(network: nn.Module) -> nn.Module:
    """A second tree of modules around the same parameters, which are frozen."""
    return copy.deepcopy(network.requires_grad_(False), {id(weight): weight for weight in network.parameters()})


def _adapted_layers(network: nn.Module) -> list[str]:
    layers = [
        path
        for path, layer in network.named_modules()
        if not set(ADAPTED).isdisjoint(path.split("."))
        # Depthwise convolutions have few weights already, and peft cannot merge them.
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]
    if not layers:
        raise FewstepError(f"{type(network).__name__} has no attention that adapters fit: train it with lora_rank 0")
    return layers
