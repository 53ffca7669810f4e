"""Distances between sets of features, real (N, D) and generated (M, D).

All of them depend on how many images there are, the Fréchet distance most: with fewer than D images the covariances are
rank-deficient and the distance is too large, by an amount that falls as N grows. Compare models at equal N only.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtime.errors import FewstepError, require

PRECISION_NEIGHBOURS = 3  # as in Kynkäänniemi et al.
DENSITY_NEIGHBOURS = 5  # as in Naeem et al.
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 500
CHUNK = 1024


class _Precomputed(nn.Module):
    """Stands where torchmetrics expects the feature network, for features that are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def require_images(count: int, least: int) -> None:
    """Check that there are enough images.

    Raises:
        FewstepError: there are not.
    """
    if count < least:
        raise FewstepError(f"{count} images are too few to compare: give at least {least}, real and generated each")


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance between the Gaussians of two feature sets (arXiv 1706.08500, eq. 6).

    With our features it is called FD-EffLite0, never FID: its scale is another.
    """
    require_images(min(len(real), len(generated)), 2)
    metric = require("torchmetrics.image.fid", "eval").FrechetInceptionDistance(_Precomputed(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Kernel distance, KID's unbiased squared MMD with a cubic kernel (arXiv 1801.01401): mean and standard deviation.

    Both are over 100 random subsets of half the smaller set, 500 at most; the subsets are the same in every call.
    """
    require_images(min(len(real), len(generated)), 4)
    squared_mmd = require("torchmetrics.image.kid", "eval").poly_mmd
    size = min(KERNEL_SUBSET_SIZE, len(real) // 2, len(generated) // 2)
    generator = torch.Generator().manual_seed(0)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    distances = torch.stack([squared_mmd(subset(real), subset(generated)) for _ in range(KERNEL_SUBSETS)])
    return float(distances.mean()), float(distances.std(correction=0))


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = PRECISION_NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991), both in [0, 1].

    Precision is the share of generated images inside the real manifold, recall that of real images inside the generated
    one; a manifold is the union of the balls that reach from each image to its k-th neighbour.
    """
    require_images(min(len(real), len(generated)), neighbours + 1)

    def share_inside(points: Tensor, manifold: Tensor) -> float:
        inside = [balls.any(dim=1) for balls in _balls_holding(points, manifold, neighbours)]
        return float(torch.cat(inside).double().mean())

    return share_inside(generated, real), share_inside(real, generated)


def density_coverage(real: Tensor, generated: Tensor, neighbours: int = DENSITY_NEIGHBOURS) -> tuple[float, float]:
    """Density, 0 and up, and coverage, in [0, 1] (arXiv 2002.09797): as above, less swayed by outliers.

    Density is how many real balls hold a generated image, over k; coverage is the share of real balls that hold one.
    """
    require_images(min(len(real), len(generated)), neighbours + 1)
    chunks = [balls.sum(dim=0) for balls in _balls_holding(generated, real, neighbours)]
    held = torch.stack(chunks).sum(dim=0)
    return float(held.sum()) / (neighbours * len(generated)), float((held > 0).double().mean())


def match_at_1(
    generated: Tensor,
    gallery: Tensor,
    wanted: Sequence[tuple[str, str]],
    shown: Sequence[tuple[str, str]],
) -> tuple[float, float]:
    """Share of generated images whose nearest real image, by cosine, has the prompted label; and label and style.

    Args:
        generated: (M, D).
        gallery: (G, D) real images to find them among.
        wanted: (label, style) prompted for each generated image.
        shown: (label, style) of each real image.
    """
    directions = functional.normalize(gallery).T
    chunks = [functional.normalize(chunk) @ directions for chunk in torch.split(generated, CHUNK)]
    nearest = [shown[position] for chunk in chunks for position in chunk.argmax(dim=1).tolist()]
    return share_equal(wanted, nearest)


def share_equal(wanted: Sequence[tuple[str, str]], found: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Share of pairs whose labels are equal, and whose labels and styles are."""
    pairs = list(zip(wanted, found, strict=True))
    labels = sum(one[0] == other[0] for one, other in pairs)
    return labels / len(pairs), sum(one == other for one, other in pairs) / len(pairs)


def pair_distance(features: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of images within a group, and over groups; in [0, 1] for features >= 0.

    It is a feature distance, not LPIPS: of pooled features, which see what a picture shows more than where.

    Args:
        features: (G, S, D) of G groups of S images, 2 at least.
    """
    size = features.shape[1]
    total = functional.normalize(features.double(), dim=-1).sum(dim=1)
    # All S^2 cosines of a group add up to the squared length of its sum; S of them are an image's with itself.
    cosines = (total.square().sum(dim=-1) - size) / (size * (size - 1))
    return float(1 - cosines.mean())


def _balls_holding(points: Tensor, centres: Tensor, neighbours: int) -> Iterator[Tensor]:
    """For each chunk of points: which of the N balls around the centres hold each, (chunk, N) bool."""
    # float64, for cdist subtracts squared norms: in float32 an image would not lie at distance 0 from itself.
    points, centres = points.double(), centres.double()
    distances = (torch.cdist(chunk, centres) for chunk in torch.split(centres, CHUNK))
    # Each centre's nearest neighbour is itself, hence the + 1.
    radii = torch.cat([chunk.kthvalue(neighbours + 1, dim=1).values for chunk in distances])
    for chunk in torch.split(points, CHUNK):
        yield torch.cdist(chunk, centres) <= radii
