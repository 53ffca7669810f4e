"""Batches as pure functions of (step, phase): nothing to save or rewind, and any step can be asked for again."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..runtime.denoiser import Condition
from .text_cache import TextCache


def batch_indices(step: int, phase: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Which samples a batch holds: every epoch is a fresh permutation, and batches run across its end.

    Returns:
        (batch_size,) int64 in [0, count).
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // count
    indices = torch.empty_like(positions)
    for epoch in sorted(set(epochs.tolist())):
        chosen = epochs == epoch
        indices[chosen] = _permutation(count, seed, phase, epoch)[positions[chosen] % count]
    return indices


@lru_cache(maxsize=8)  # two epochs of every phase: a large data set's takes longer than the rest of a batch
def _permutation(count: int, seed: int, phase: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 16 + phase) * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


@dataclass(frozen=True)
class ImageBatches:
    """Images in [-1, 1], each mirrored half of the time.

    Args:
        images: (N, 3, H, W) uint8.
        batch_size: images a batch.
        seed: of the order and the mirroring.
        device: where batches go.
    """

    images: Tensor
    batch_size: int
    seed: int
    device: torch.device

    def __call__(self, step: int, phase: int) -> Tensor:
        """(B, 3, H, W) float32."""
        chosen = self.images[batch_indices(step, phase, self.batch_size, len(self.images), self.seed)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        mirrored = torch.rand(len(chosen), generator=generator) < 0.5
        chosen = torch.where(mirrored[:, None, None, None], chosen.flip(-1), chosen)
        return (chosen.to(self.device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class ConditionedBatch:
    """What teacher and student training see: `x_0` (B, C, H, W) in the denoiser's space, and its condition."""

    x_0: Tensor
    condition: Condition


@dataclass(frozen=True)
class LatentBatches:
    """Latents with the token states of one of their captions, drawn anew each time.

    Args:
        latents: (N, C, H, W) float32, scaled to the denoiser's space.
        text: token states of every caption.
        batch_size: samples a batch.
        seed: of order and captions.
        device: where batches go.
    """

    latents: Tensor
    text: TextCache
    batch_size: int
    seed: int
    device: torch.device

    def __call__(self, step: int, phase: int) -> ConditionedBatch:
        """One batch."""
        indices = batch_indices(step, phase, self.batch_size, len(self.latents), self.seed)
        generator = torch.Generator().manual_seed((self.seed * 16 + phase) * 1_000_003 + step)
        condition = self.text.condition(indices, torch.rand(len(indices), generator=generator))
        moved = {name: value.to(self.device) for name, value in condition.items()}
        return ConditionedBatch(self.latents[indices].to(self.device), moved)
