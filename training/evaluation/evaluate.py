"""Runs a generator over the captions of a data set and measures what comes out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

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
    pair_distance,
    precision_recall,
    require_images,
    share_equal,
)
from .reference import Reference, shown_by
from .split import Report, Split, prompt_positions

LEAST_IMAGES = DENSITY_NEIGHBOURS + 1
FD_IMAGES = 200
"""Below this, half the real emoji is further from the other half (119 at 91 images) than a fair generator at 400."""
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 32, 4

Generate = Callable[[Sequence[str], Sequence[int]], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Scores:
    """How generated images compare with real ones; `metrics` defines each score.

    `fd` is FD-EffLite0, the Fréchet distance in EfficientNet-Lite0 features; None with fewer than `FD_IMAGES` images on
    either side. Compare scores of as many images only.
    """

    fd: float | None
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
    """Scores of a generator, and what it was asked for.

    Args:
        diversity: intra-prompt feature distance, `metrics.pair_distance` over `DIVERSITY_SEEDS` images of each of the
            first `DIVERSITY_PROMPTS` prompts; 0 if the seed makes no difference.
        seed: of the first image; the others count up from it.
        seconds: spent generating, the further images for `diversity` included.
        split: the captions' split.
        data: identity of the captions and real images.
        feature_network: name of the network that compares images.
        feature_identity: SHA-256 of that network.
    """

    diversity: float
    seed: int
    seconds: float
    split: str
    data: str
    feature_network: str
    feature_identity: str


@dataclass(frozen=True)
class Floors:
    """What the scores are at their best and at their worst.

    Args:
        halves: one random half of the real images against the other, as new images from a perfect generator would score
            (at as many images); but its matches find the same thing in another style, if at all.
        shuffled_match_at_1: of real images under each other's captions, as of a generator that ignores its prompt.
        shuffled_match_style_at_1: the same for label and style.
        unrelated_distance: `metrics.pair_distance` of real images of any caption, the most that `diversity` should be.
    """

    halves: Scores
    shuffled_match_at_1: float
    shuffled_match_style_at_1: float
    unrelated_distance: float


def evaluate(
    generate: Generate,
    split: Split,
    network: FeatureNetwork,
    count: int,
    seed: int,
    batch_size: int = 32,
    report: Report | None = None,
) -> Evaluation:
    """Generate `count` images from the split's captions and compare them with the real images of the same captions.

    Args:
        generate: takes prompts and as many seeds, returns (N, H, W, 3) uint8 images.
        split: whose canonical captions are the prompts, see `prompt_positions`.
        network: what made the split's features, and sees the generated images.
        count: how many to generate; beyond the number of captions they come round again with other seeds.
        seed: of the first image; the others count up from it.
        batch_size: prompts a call of `generate`.
        report: follows the stages `generate` and `features`.

    Raises:
        FewstepError: too few images for a metric, or generated images that differ in size from the real ones.
    """
    report = report or (lambda stage, done, total: None)
    captions = len(split.images.captions)
    require_images(min(count, captions), LEAST_IMAGES)
    positions = prompt_positions(captions, count)
    repeated = positions[: min(DIVERSITY_PROMPTS, count, captions)]
    asked = positions + (DIVERSITY_SEEDS - 1) * repeated
    begin = time.perf_counter()
    images = _generate_all(generate, split.images, asked, seed, batch_size, partial(report, "generate"))
    seconds = time.perf_counter() - begin
    features = compute_features(network, images, partial(report, "features"))
    generated, again = features[:count], torch.split(features[count:], len(repeated))
    shown = shown_by(split.images)
    real = split.reference.features[positions[:captions]]
    scores = _score(real, generated, split.gallery, [shown[position] for position in positions])
    return Evaluation(
        **asdict(scores),
        diversity=pair_distance(torch.stack([generated[: len(repeated)], *again], dim=1)),
        seed=seed,
        seconds=seconds,
        split=split.name,
        data=split.images.identity,
        feature_network=network.name,
        feature_identity=network.identity,
    )


@lru_cache(maxsize=1)  # a benchmark asks again for every contender
def floors(split: Split, count: int) -> Floors:
    """The scores of real images against real ones: two random halves, of `count` images each at most.

    Raises:
        FewstepError: too few images for a metric.
    """
    features, shown = split.reference.features, split.reference.shown
    require_images(count, LEAST_IMAGES)
    require_images(len(shown), 2 * LEAST_IMAGES)
    order = prompt_positions(len(shown), len(shown))
    size = min(count, len(order) // 2)
    one, other = (
        Reference(features[half], tuple(shown[position] for position in half))
        for half in (order[:size], order[size : 2 * size])
    )
    return Floors(
        _score(one.features, other.features, one, other.shown),
        *share_equal(shown, [shown[position] for position in order]),
        pair_distance(one.features[None]),
    )


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
        fd=frechet_distance(real, generated) if min(len(real), len(generated)) >= FD_IMAGES else None,
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
