"""Samples that show what range each activation takes: noise and prompts, along the trajectory that a graph holds."""

from collections.abc import Sequence
from itertools import cycle, islice

from ..runtime.engines import Arrays, Engines
from ..runtime.errors import FewstepError
from ..runtime.text import Tokenizer
from .parity import make_inputs

PROMPTS = (
    "a cat",
    "grinning face with big eyes",
    "red heart",
    "a blue car seen from the side",
    "waning crescent moon",
    "woman with long hair, medium-dark skin tone",
    "flag: Brazil",
    "a slice of pizza with cheese",
    "keycap: 7",
    "snow-capped mountain under a clear sky",
    "a musical note",
    "black ankle boot",
    "green leaf fluttering in the wind",
    "a ship at night",
    "person in lotus position",
    "clock face, ten o'clock",
)
"""Short and long, things and signs; none is among those that the gate compares."""
SEEDS = range(1000, 1064)
"""One sample each, four of every prompt; none is among those that the gate compares."""
CALIBRATED = ("int8static", "fp8")
"""Precisions whose activations are scaled beforehand."""


def calibration_samples(reference: Engines, tokenize: Tokenizer) -> list[Arrays]:
    """Inputs of a trajectory, one image each: noise of `SEEDS` and the conditions of `PROMPTS` in turn.

    Args:
        reference: torch, in float32.
        tokenize: makes prompts into the text encoder's inputs.
    """
    prompts = list(islice(cycle(PROMPTS), len(SEEDS)))
    tokens, noise = make_inputs(tokenize, reference, prompts, SEEDS)
    return single_images({"noise": noise, **reference.condition(tokens)})


def single_images(inputs: Arrays) -> list[Arrays]:
    """A batch as batches of one."""
    count = len(next(iter(inputs.values())))
    return [{name: array[place : place + 1] for name, array in inputs.items()} for place in range(count)]


def require_samples(samples: Sequence[Arrays]) -> None:
    """Raise `FewstepError` if there are none."""
    if not samples:
        raise FewstepError(
            "only whole trajectories have samples to scale activations by: take another precision, or --shape fused"
        )


def record(precision: str) -> dict[str, int]:
    """What the manifest says of the samples; nothing for a precision that takes none."""
    if precision not in CALIBRATED:
        return {}
    return {"samples": len(SEEDS), "prompts": len(PROMPTS), "first_seed": SEEDS[0]}
