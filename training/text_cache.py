"""Token states of every caption of a data set, encoded once: the text encoder is never trained and never run again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.denoiser import Condition
from ..runtime.files import atomic_path
from ..runtime.text import TOKENS, TextEncoder


@dataclass(frozen=True)
class TextCache:
    """Token states by caption, and which captions each sample has.

    Args:
        states: (U, L, D) float16, one row a distinct caption.
        mask: (U, L) int64, 1 for tokens.
        first: (N,) where a sample's captions begin in `variants`.
        variants: rows of `states`, sample after sample.
    """

    states: Tensor
    mask: Tensor
    first: Tensor
    variants: Tensor

    def condition(self, indices: Tensor, choice: Tensor) -> Condition:
        """Condition of the samples `indices` (B,), picking a caption by `choice` (B,) in [0, 1)."""
        begin, end = self.first[indices], self.first[indices + 1]
        rows = self.variants[begin + ((end - begin) * choice).long()]
        return {"encoder_hidden_states": self.states[rows].float(), "encoder_attention_mask": self.mask[rows]}


def cache_text(captions: Sequence[Sequence[str]], encoder: TextEncoder, folder: Path) -> TextCache:
    """Encode every distinct caption, or read them from `folder` when the captions and the encoder are unchanged.

    Args:
        captions: caption variants of each sample, at least one each.
        encoder: gives the token states.
        folder: where the cache file is kept.
    """
    distinct = sorted({caption for variants in captions for caption in variants})
    key = hashlib.sha256(json.dumps([encoder.identity, TOKENS, distinct]).encode()).hexdigest()[:16]
    path = folder / f"text-{key}.safetensors"
    if not path.exists():
        _encode(distinct, encoder, path)
    tensors = load_file(path)
    row = {caption: index for index, caption in enumerate(distinct)}
    counts = torch.tensor([0] + [len(variants) for variants in captions])
    variants = torch.tensor([row[caption] for variants in captions for caption in variants])
    return TextCache(tensors["states"], tensors["mask"], counts.cumsum(0), variants)


def _encode(captions: list[str], encoder: TextEncoder, path: Path) -> None:
    chunks = [captions[start : start + 128] for start in range(0, len(captions), 128)]
    encoded = [encoder(chunk) for chunk in track(chunks, "encoding captions")]
    states = torch.cat([item["encoder_hidden_states"].half() for item in encoded])
    mask = torch.cat([item["encoder_attention_mask"] for item in encoded])
    with atomic_path(path) as temporary:
        save_file({"states": states, "mask": mask}, temporary)
