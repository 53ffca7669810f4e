"""Runs a generator over the captions of a data set and measures what comes out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...runtime.errors import FewstepError
from ..data.packed import CaptionedImages
from .features import FeatureNetwork, compute_features
from .metrics import (
    DENSITY_NEIGHBOURS,
    density_coverage,
    frechet_distance,
    kernel_distance,
    match_at_1,
    precision_recall,
    require_images,
    share_equal,
)
from .reference import Reference, shown_by

LEAST_IMAGES = DENSITY_NEIGHBOURS + 1

Generate = Callable[[Sequence[str], Sequence[int]], npt.NDArray[np.uint8]]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scores:
    """How generated images compare with real ones; `metrics` defines each score.

    `fd` is FD-EffLite0, the Fréchet distance in EfficientNet-Lite0 features. Compare scores of as many images only.
    """

    fd: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    density: float
    coverage: float
    match_at_1: float
    match_style_at_1: float
    images: int
    real_images: int


@dataclass(frozen=True)
class Evaluation(Scores):
    """Scores of a generator, and all that is needed to get them again.

    Args:
        seed: of the first image; the others count up from it.
        seconds: spent generating.
        data: identity of the captions and real images.
        feature_network: name of the network that compares images.
        feature_identity: SHA-256 of that network.
        split: the captions' split.
        steps: network evaluations, as are the next three of the pipeline that generated.
        sampler: its name.
        guidance: scale.
        engine: its name.
    """

    seed: int
    seconds: float
    data: str
    feature_network: str
    feature_identity: str
    split: str | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    engine: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Floors:
    """What the scores are at their best and at their worst.

    Args:
        halves: one random half of the real images against the other, as new images from a perfect generator would score
            (at as many images); but its matches find the same thing in another style, if at all.
        shuffled_match_at_1: of real images under each other's captions, as of a generator that ignores its prompt.
        shuffled_match_style_at_1: the same for label and style.
    """

    halves: Scores
    shuffled_match_at_1: float
    shuffled_match_style_at_1: float


def evaluate(
    generate: Generate,
    data: CaptionedImages,
    reference: Reference,
    gallery: Reference,
    network: FeatureNetwork,
    count: int,
    seed: int,
    batch_size: int = 32,
    report: Report | None = None,
) -> Evaluation:
    """Generate `count` images from the data's captions and compare them with the real images of the same captions.

    Args:
        generate: takes prompts and as many seeds, returns (N, H, W, 3) uint8 images.
        data: whose canonical captions are the prompts, see `prompt_positions`.
        reference: features of these data.
        gallery: the real images in which match@1 looks for the nearest.
        network: what made both, and sees the generated images.
        count: how many to generate; beyond the number of captions they come round again with other seeds.
        seed: of the first image; the others count up from it.
        batch_size: prompts a call of `generate`.
        report: called with (stage, images done, images in all).

    Raises:
        FewstepError: too few images for a metric, or generated images that differ in size from the real ones.
    """
    report = report or (lambda stage, done, total: None)
    require_images(min(count, len(data.captions)), LEAST_IMAGES)
    positions = prompt_positions(len(data.captions), count)
    begin = time.perf_counter()
    images = _generate_all(generate, data, positions, seed, batch_size, partial(report, "generate"))
    seconds = time.perf_counter() - begin
    generated = compute_features(network, images, partial(report, "features"))
    shown = shown_by(data)
    real = reference.features[positions[: len(data.captions)]]
    scores = _score(real, generated, gallery, [shown[position] for position in positions])
    return Evaluation(
        **asdict(scores),
        seed=seed,
        seconds=seconds,
        data=data.identity,
        feature_network=network.name,
        feature_identity=network.identity,
    )


def floors(reference: Reference, count: int) -> Floors:
    """The scores of real images against real ones: two random halves, of `count` images each at most.

    Raises:
        FewstepError: too few images for a metric.
    """
    require_images(count, LEAST_IMAGES)
    require_images(len(reference.shown), 2 * LEAST_IMAGES)
    order = prompt_positions(len(reference.shown), len(reference.shown))
    size = min(count, len(order) // 2)
    one, other = (
        Reference(reference.features[half], tuple(reference.shown[position] for position in half))
        for half in (order[:size], order[size : 2 * size])
    )
    shuffled = share_equal(reference.shown, [reference.shown[position] for position in order])
    return Floors(_score(one.features, other.features, one, other.shown), *shuffled)


def prompt_positions(captions: int, count: int) -> list[int]:
    """Which captions to generate from: the first `count` of one fixed shuffle, round after round.

    They depend on nothing else: every model gets the same prompts, and a smaller count some of a larger one's.
    """
    order = torch.randperm(captions, generator=torch.Generator().manual_seed(0)).tolist()
    return [order[index % captions] for index in range(count)]


def _generate_all(
    generate: Generate,
    data: CaptionedImages,
    positions: Sequence[int],
    seed: int,
    batch_size: int,
    callback: Callable[[int, int], None],
) -> Tensor:
    count, size = len(positions), tuple(data.images.shape[2:])
    images = torch.empty(count, *data.images.shape[1:], dtype=torch.uint8)
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        arrays = generate([data.captions[positions[i]][0] for i in indices], [seed + i for i in indices])
        if arrays.shape[1:3] != size:
            made, real = (f"{height} x {width}" for height, width in (arrays.shape[1:3], size))
            raise FewstepError(f"the model makes {made} images but the data are {real}: build the data at that size")
        images[indices.start : indices.stop] = torch.from_numpy(arrays).permute(0, 3, 1, 2)
        callback(indices.stop, count)
    return images


def _score(real: Tensor, generated: Tensor, gallery: Reference, wanted: Sequence[tuple[str, str]]) -> Scores:
    kid, kid_std = kernel_distance(real, generated)
    precision, recall = precision_recall(real, generated)
    density, coverage = density_coverage(real, generated)
    match, match_style = match_at_1(generated, gallery.features, wanted, gallery.shown)
    return Scores(
        fd=frechet_distance(real, generated),
        kid=kid,
        kid_std=kid_std,
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        match_at_1=match,
        match_style_at_1=match_style,
        images=len(generated),
        real_images=len(real),
    )
