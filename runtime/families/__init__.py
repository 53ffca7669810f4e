"""Model families: how a diffusers pipeline's parts become a denoiser and a decoder. One file each.

A family's file offers `GUIDANCE` (the scale that diffusers takes by default, or None where only directories with a
`fewstep.json` can be opened), `NETWORK` (the folder of the trained module), `load`, `network_call`, and for training
`feature_block`, `with_guidance_input` and `save_student`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..denoiser import Condition, Denoiser
from ..errors import FewstepError, first_line
from ..files import read_json, write_json
from ..quiet import quiet
from ..text import PromptEncoder

_FAMILIES = {
    "SanaPipeline": "sana",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
}


PartLoader = Callable[[Any, Path, torch.device], Any]
"""`loader(kind, folder, device)`: the module of a class and a folder, or what is called as it would be."""


@dataclass(frozen=True)
class Model:
    """A loaded teacher or student.

    Args:
        network: the trained diffusers module behind `denoiser`.
        denoiser: predicts `x_0` in latent space.
        encoder: module from images (B, 3, H, W) in [0, 1] to latents (B, C, h, w).
        decoder: module from latents (B, C, h, w) to images (B, 3, H, W) in [0, 1].
        sample_shape: (C, h, w) of one latent.
        load_text_encoder: loads the encoder of prompts, which may be larger than the network: whoever asks for it keeps
            it for as long as it is needed.
    """

    network: nn.Module
    denoiser: Denoiser
    encoder: nn.Module
    decoder: nn.Module
    sample_shape: tuple[int, int, int]
    load_text_encoder: Callable[[], PromptEncoder]


def load_model(directory: Path, device: torch.device, loader: PartLoader | None = None) -> Model:
    """Open a diffusers directory.

    Args:
        directory: holds `model_index.json`.
        device: where it runs.
        loader: loads each module; None takes `load_part`.

    Raises:
        FewstepError: no such directory, an unknown family, or weights that are missing, corrupt or of the wrong shape.
    """
    if not (directory / "model_index.json").is_file():
        raise FewstepError(f"{directory} is not a model: it has no model_index.json")
    family = family_of(directory)
    model: Model = family.load(directory, device, loader or load_part)
    return model


def family_of(directory: Path) -> ModuleType:
    """The family module of a diffusers directory.

    Raises:
        FewstepError: the family is not supported.
    """
    index = read_json(directory / "model_index.json")
    name = index.get("_class_name", "") if isinstance(index, dict) else ""
    if name not in _FAMILIES:
        supported = ", ".join(sorted(_FAMILIES))
        raise FewstepError(f"{directory} holds a {name or 'nameless pipeline'}: supported are {supported}")
    return importlib.import_module(f".{_FAMILIES[name]}", __name__)


def load_part(kind: type[nn.Module], folder: Path, device: torch.device) -> nn.Module:
    """Load one module of diffusers or transformers in float32, for inference, from this folder alone.

    Raises:
        FewstepError: the weights are missing, corrupt or of the wrong shape.
    """
    if not (folder / "config.json").is_file():
        raise FewstepError(f"cannot load {folder}: it has no config.json; {UNFIT}")
    try:
        with quiet(kind.__module__.split(".")[0]):
            part, found = kind.from_pretrained(  # type: ignore[attr-defined]
                folder,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise FewstepError(f"cannot load {folder}: {clause(error)}; {UNFIT}") from error
    if odd := [*found["missing_keys"], *found["unexpected_keys"]]:
        raise FewstepError(f"cannot load {folder}: its weights and its config.json differ in {min(odd)}; {UNFIT}")
    return part.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def save_part(part: Any, folder: Path) -> None:
    """Write one diffusers module in float16, without the path that it was loaded from."""
    part.half().save_pretrained(folder)
    config = read_json(folder / "config.json")
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)


UNFIT = "the files are missing, cut short or of another model"


def clause(error: Exception) -> str:
    """What an error says in a line, for a sentence that goes on."""
    return first_line(error).rstrip(".:")


def guidance_of(condition: Condition) -> Tensor:
    """The guidance scale (B,) that a network with an input for it is given.

    Raises:
        FewstepError: the condition holds none.
    """
    if "guidance" not in condition:
        raise FewstepError(
            "this network takes the guidance scale as an input: its fewstep.json must give a guidance_range"
        )
    return condition["guidance"]


class LatentEncoder(nn.Module):
    """Images in [0, 1] to latents in the denoiser's space: `(z - shift_factor) * scaling_factor`."""

    def __init__(self, encode: nn.Module, scaling_factor: float, shift_factor: float = 0.0) -> None:
        super().__init__()
        self.encode = encode
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w)."""
        latents: Tensor = self.encode(2 * images - 1)
        return (latents - self.shift_factor) * self.scaling_factor


class LatentDecoder(nn.Module):
    """Latents in the denoiser's space to images in [0, 1], through `z = latents / scaling_factor + shift_factor`."""

    def __init__(self, decode: nn.Module, scaling_factor: float, shift_factor: float = 0.0) -> None:
        super().__init__()
        self.decode = decode
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, H, W)."""
        images: Tensor = self.decode(latents / self.scaling_factor + self.shift_factor)
        return (images / 2 + 0.5).clamp(0, 1)
