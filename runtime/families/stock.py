"""What families of whole diffusers directories share: KL autoencoders, text encoders, and the files of students."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artefact import INDEX, parts_of, weights_hash
from ..errors import FewstepError
from ..files import read_json, write_json
from ..quiet import quiet
from . import UNFIT, LatentDecoder, LatentEncoder, PartLoader, clause, save_part

_TEXT_PARTS = ("text_encoder", "tokenizer")


class _Encode(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        encoded = self.vae.encode(images, return_dict=False)[0]
        mean: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mode()  # a tiny one gives no distribution
        return mean


class _Decode(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images


def latent_maps(vae: Any) -> tuple[LatentEncoder, LatentDecoder]:
    """Images to latents and back by an `AutoencoderKL` or `AutoencoderTiny`; latents are means, nothing is drawn."""
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return LatentEncoder(_Encode(vae), scaling, shift), LatentDecoder(_Decode(vae), scaling, shift)


@dataclass(frozen=True)
class StockTextEncoder:
    """The text encoders of a diffusers pipeline, behind its own `encode_prompt`.

    Args:
        encode: prompts to the condition's tensors.
        identity: SHA-256 over the files of encoders and tokenizers.
        networks: the encoders, by the names of their folders.
    """

    encode: Callable[[list[str]], dict[str, Tensor]]
    identity: str
    networks: Mapping[str, nn.Module]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition in float32 on the CPU, one row a prompt."""
        return {name: value.float().cpu() for name, value in self.encode(list(prompts)).items()}


def text_identity(directory: Path) -> str:
    """SHA-256 over the files of a directory's text encoders and tokenizers."""
    return weights_hash(directory, _TEXT_PARTS)


def load_text_pipeline(
    kind: Any, directory: Path, device: torch.device, loader: PartLoader, **given: Any
) -> tuple[Any, dict[str, nn.Module]]:
    """A diffusers pipeline in float32 with the text encoders and tokenizers of `directory`, and these encoders by name.

    Args:
        kind: the pipeline's class.
        directory: holds the parts.
        device: where the encoders run.
        loader: loads them.
        given: further arguments of `kind`, which are not loaded: parts that its `encode_prompt` looks at, or None.

    Raises:
        FewstepError: a part is missing, corrupt or of the wrong shape.
    """
    index = read_json(directory / INDEX)
    parts = {name: part for name, part in index.items() if isinstance(part, list) and name not in given}
    loaded = {
        name: _load_text_part(directory / name, class_name, device, loader) if name.startswith(_TEXT_PARTS) else None
        for name, (_, class_name) in parts.items()
    }
    encoders = {name: part for name, part in loaded.items() if part is not None and name.startswith(_TEXT_PARTS[0])}
    try:
        with quiet("diffusers"):
            return kind(**loaded, **given), encoders
    except (TypeError, ValueError) as error:
        raise FewstepError(f"cannot open {directory}: its {INDEX} lacks a part ({clause(error)})") from error


def _load_text_part(folder: Path, class_name: str | None, device: torch.device, loader: PartLoader) -> Any:
    if class_name is None:
        return None
    import transformers

    kind = getattr(transformers, class_name, None)
    if kind is None:
        raise FewstepError(f"cannot load {folder}: transformers has no {class_name}")
    if folder.name.startswith("text_encoder"):
        return loader(kind, folder, device)
    names = kind.vocab_files_names
    # From a folder without them, transformers makes a tokenizer that knows no word.
    if not any((folder / names[file]).is_file() for file in ("vocab_file", "tokenizer_file") if file in names):
        raise FewstepError(f"cannot load {folder}: it has no vocabulary; {UNFIT}")
    try:
        with quiet("transformers"):
            return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its readers in Rust raise nothing narrower
        raise FewstepError(f"cannot load {folder}: {clause(error)}; {UNFIT}") from error


def save_beside_parts(directory: Path, teacher: Path, name: str, network: Any, scheduler: Any) -> None:
    """Write a network in float16 and a scheduler, and copy every other part that the teacher's directory has.

    Args:
        directory: an existing folder.
        teacher: a diffusers directory.
        name: of the network's folder.
        network: the diffusers module.
        scheduler: with which stock diffusers samples as fewstep does.
    """
    save_part(network, directory / name)
    scheduler.save_pretrained(directory / "scheduler")
    kept = parts_of(teacher)
    for part in kept:
        if part not in (name, "scheduler"):
            shutil.copytree(teacher / part, directory / part)
    index = read_json(teacher / INDEX)
    absent = {part: [None, None] for part, kind in index.items() if isinstance(kind, list) and part not in kept}
    written = {"scheduler": ["diffusers", type(scheduler).__name__]}
    write_json(directory / INDEX, {**index, **absent, **written})
