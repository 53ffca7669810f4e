"""Model families: how a diffusers pipeline's parts become a denoiser and a decoder. One file each."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import FewstepError
from ..files import read_json
from ..text import TextEncoder

_FAMILIES = {"SanaPipeline": "sana"}


@dataclass(frozen=True)
class Model:
    """A loaded teacher or student.

    Args:
        network: the trained diffusers module behind `denoiser`.
        denoiser: predicts `x_0` in latent space.
        encoder: module from images (B, 3, H, W) in [0, 1] to latents (B, C, h, w).
        decoder: module from latents (B, C, h, w) to images (B, 3, H, W) in [0, 1].
        sample_shape: (C, h, w) of one latent.
        load_text_encoder: gives the encoder of prompts; called only when prompts come as words.
    """

    network: nn.Module
    denoiser: Denoiser
    encoder: nn.Module
    decoder: nn.Module
    sample_shape: tuple[int, int, int]
    load_text_encoder: Callable[[], TextEncoder]


def load_model(directory: Path, device: torch.device) -> Model:
    """Open a diffusers directory.

    Raises:
        FewstepError: no such directory, an unknown family, or weights that are missing, corrupt or of the wrong shape.
    """
    if not (directory / "model_index.json").is_file():
        raise FewstepError(f"{directory} is not a model: it has no model_index.json")
    family = family_of(directory)
    model: Model = family.load(directory, device)
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
    """Load one diffusers module in float32, for inference, from this folder alone.

    Raises:
        FewstepError: the weights are missing, corrupt or of the wrong shape.
    """
    if not (folder / "config.json").is_file():
        raise FewstepError(f"cannot load {folder}: it has no config.json; {_UNFIT}")
    try:
        with _no_warnings():
            part, found = kind.from_pretrained(  # type: ignore[attr-defined]
                folder,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise FewstepError(f"cannot load {folder}: {_first_line(error)}; {_UNFIT}") from error
    if odd := [*found["missing_keys"], *found["unexpected_keys"]]:
        raise FewstepError(f"cannot load {folder}: its weights and its config.json differ in {min(odd)}; {_UNFIT}")
    return part.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


_UNFIT = "the files are missing, cut short or of another model"


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep diffusers from reporting at length what is refused in one sentence."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__


class LatentEncoder(nn.Module):
    """Images in [0, 1] to latents in the denoiser's space."""

    def __init__(self, encode: nn.Module, scaling_factor: float) -> None:
        super().__init__()
        self.encode = encode
        self.scaling_factor = scaling_factor

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w)."""
        latents: Tensor = self.encode(2 * images - 1)
        return latents * self.scaling_factor


class LatentDecoder(nn.Module):
    """Latents in the denoiser's space to images in [0, 1]."""

    def __init__(self, decode: nn.Module, scaling_factor: float) -> None:
        super().__init__()
        self.decode = decode
        self.scaling_factor = scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, H, W)."""
        images: Tensor = self.decode(latents / self.scaling_factor)
        return (images / 2 + 0.5).clamp(0, 1)
