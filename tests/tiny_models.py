"""Tiny random models of the built-in family, saved as training saves them; their images are 8x8."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.runtime.artefact import save_artefact
from fewstep.runtime.families import sana
from fewstep.runtime.schedule import uniform_times
from fewstep.training.autoencoder import AutoencoderConfig, build_autoencoder
from fewstep.training.teacher import TeacherConfig, build_teacher


def tiny_transformer() -> Any:
    """A network of one block, for latents (4, 4, 4)."""
    transformer: Any = build_teacher(TeacherConfig(layers=1, heads=2), channels=4, size=4)
    # A head of the linear attention that attends to nothing, as trained ones do for some tokens, has normaliser 0.
    transformer.transformer_blocks[0].attn1.to_q.weight.data[:32] = 0
    return transformer


def tiny_autoencoder() -> nn.Module:
    """Images (3, 8, 8) to latents (4, 4, 4) and back."""
    shape = AutoencoderConfig(latent_channels=4, channels=(8, 8), encoder_layers=(0, 1), decoder_layers=(0, 1))
    return build_autoencoder(shape)


def save_tiny(directory: Path, kind: str, steps: list[int], sampler: str = "consistency") -> Path:
    """Write a teacher or student with the same random weights each time."""
    torch.manual_seed(0)
    card = {
        "kind": kind,
        "method": "none",
        "steps": steps,
        "times": {str(count): uniform_times(count) for count in steps},
        "sampler": sampler,
        "guidance": 3.0,
    }
    transformer, autoencoder = tiny_transformer(), tiny_autoencoder()
    save_artefact(directory, lambda folder: sana.save(folder, transformer, autoencoder), card)
    return directory
