"""Conditions of every caption of a data set, encoded once: the text encoders are never trained and never run again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.denoiser import Condition
from ..runtime.files import atomic_path
from ..runtime.text import PromptEncoder


@dataclass(frozen=True)
class TextCache:
    """Conditions by caption, and which captions each sample has.

    Args:
        conditions: what the encoder gives, by name: (U, ...), one row a distinct caption, numbers in float16.
        first: (N,) where a sample's captions begin in `variants`.
        variants: rows of `conditions`, sample after sample.
    """

    conditions: Mapping[str, Tensor]
    first: Tensor
    variants: Tensor

    def condition(self, indices: Tensor, choice: Tensor) -> Condition:
        """Condition of the samples `indices` (B,), picking a caption by `choice` (B,) in [0, 1)."""
        begin, end = self.first[indices], self.first[indices + 1]
        rows = self.variants[begin + ((end - begin) * choice).long()]
        chosen = {name: value[rows] for name, value in self.conditions.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in chosen.items()}


def cache_text(captions: Sequence[Sequence[str]], encoder: PromptEncoder, folder: Path) -> TextCache:
    """Encode every distinct caption, or read them from `folder` when the captions and the encoder are unchanged.

    Args:
        captions: caption variants of each sample, at least one each.
        encoder: gives the conditions.
        folder: where the cache file is kept.
    """
    distinct = sorted({caption for variants in captions for caption in variants})
    key = hashlib.sha256(json.dumps([encoder.identity, distinct]).encode()).hexdigest()[:16]
    path = folder / f"text-{key}.safetensors"
    if not path.exists():
        _encode(distinct, encoder, path)
    row = {caption: index for index, caption in enumerate(distinct)}
    counts = torch.tensor([0] + [len(variants) for variants in captions])
    variants = torch.tensor([row[caption] for variants in captions for caption in variants])
    return TextCache(load_file(path), counts.cumsum(0), variants)


def _encode(captions: list[str], encoder: PromptEncoder, path: Path) -> None:
    chunks = [captions[start : start + 128] for start in range(0, len(captions), 128)]
    encoded = [encoder(chunk) for chunk in track(chunks, "encoding captions")]
    joined = {name: torch.cat([_compact(item[name]) for item in encoded]) for name in encoded[0]}
    with atomic_path(path) as temporary:
        save_file(joined, temporary)


def _compact(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value
