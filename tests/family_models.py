"""Students of diffusers' own families: tiny, random, and with text encoders of their own."""

from pathlib import Path
from typing import Any

import torch

from fewstep.runtime.artefact import save_artefact
from fewstep.runtime.families import family_of, load_model
from fewstep.runtime.schedule import uniform_times

RANGE = (2.0, 9.0)


def save_student(
    directory: Path, teacher: Path, steps: list[int], guided: bool = False, sampler: str = "consistency"
) -> Path:
    """A student whose weights lie a little beside its teacher's.

    Args:
        directory: where to.
        teacher: a diffusers directory.
        steps: that it knows.
        guided: whether it takes the guidance scale as an input.
        sampler: its own.
    """
    family, network = family_of(teacher), load_model(teacher, torch.device("cpu")).network
    card: dict[str, Any] = {
        "kind": "student",
        "method": "none",
        "steps": steps,
        "times": {str(count): uniform_times(count) for count in steps},
        "sampler": sampler,
        "guidance": 3.0,
    }
    if guided:
        network, card["guidance_range"] = family.with_guidance_input(network), list(RANGE)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * (weight.std(correction=0) or 10.0) * torch.randn_like(weight)
    save_artefact(directory, lambda folder: family.save_student(folder, network, teacher, sampler), card)
    return directory
