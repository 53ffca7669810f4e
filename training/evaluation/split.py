"""The real pictures of a split, opened once for any number of evaluations."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..data.packed import CaptionedImages, load_captioned_images
from .features import FeatureNetwork
from .reference import Reference, join, load_reference

MOST_REAL = 10_000
"""Real images that stand for a split, as many as papers compare with on COCO."""

Report = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


@dataclass(frozen=True, eq=False)
class Split:
    """What generated images are compared with.

    Args:
        name: of the split.
        images: its captions, which are the prompts, and its pictures.
        reference: features of these pictures.
        gallery: the real pictures in which match@1 looks for the nearest: these and the training pictures, so that
            prompts held out from training have their right answer in it.
    """

    name: str
    images: CaptionedImages
    reference: Reference
    gallery: Reference


def open_split(data: Path, name: str, network: FeatureNetwork, report: Report) -> Split:
    """Open a split; features that were computed before are read from `DATA/.packed/`.

    Raises:
        FewstepError: as `load_captioned_images` does.
    """
    opened = {each: sample(load_captioned_images(data, each)) for each in dict.fromkeys((name, "train"))}
    references = {
        each: load_reference(
            images, network, data / ".packed" / f"features-{each}.safetensors", partial(report, f"real, {each}")
        )
        for each, images in opened.items()
    }
    return Split(name, opened[name], references[name], join(list(references.values())))


def sample(data: CaptionedImages, most: int = MOST_REAL) -> CaptionedImages:
    """A fixed random choice of `most` pictures, read into memory; all of them where there are no more."""
    if len(data.captions) <= most:
        return data
    positions = prompt_positions(len(data.captions), most)
    return CaptionedImages(
        data.images[positions],
        tuple(data.captions[position] for position in positions),
        tuple(data.labels[position] for position in positions),
        tuple(data.styles[position] for position in positions),
        hashlib.sha256(f"{data.identity} {most}".encode()).hexdigest(),
    )


def prompt_positions(captions: int, count: int) -> list[int]:
    """Which captions to generate from: the first `count` of one fixed shuffle, round after round.

    They depend on nothing else: every model gets the same prompts, and a smaller count some of a larger one's.
    """
    order = torch.randperm(captions, generator=torch.Generator().manual_seed(0)).tolist()
    return [order[index % captions] for index in range(count)]
