"""Metrics against closed forms, hand-made cases and their symmetries."""

import pytest
import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError
from fewstep.training.evaluation import metrics
from fewstep.training.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    match_at_1,
    pair_distance,
    precision_recall,
)


def line(*positions: float) -> Tensor:
    """Points on an axis of the plane."""
    return torch.tensor([[position, 0.0] for position in positions])


def cloud(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_gaussians_is_their_closed_form() -> None:
    rotation = torch.linalg.qr(cloud(4, 4, 9)).Q
    real_deviation, fake_deviation = torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([2.0, 1.0, 0.5, 3.0])
    mean = torch.tensor([1.0, 0.0, -2.0, 0.5])
    real = cloud(40_000, 4, 1) * real_deviation @ rotation
    fake = (cloud(40_000, 4, 2) * fake_deviation + mean) @ rotation
    # The covariances commute, so the trace term is the sum of squared differences of the deviations
    exact = float(mean.square().sum() + (real_deviation - fake_deviation).square().sum())
    assert frechet_distance(real, fake) == pytest.approx(exact, rel=0.02)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    # tr((A B)^1/2) of 2x2 matrices is sqrt(tr(A B) + 2 sqrt(det(A B)))
    factors = torch.tensor([[[1.0, 0.0], [0.7, 1.5]], [[0.5, 0.9], [0.0, 1.2]]])
    A, B = factors.mT @ factors
    trace = float(((A @ B).trace() + 2 * torch.linalg.det(A @ B).sqrt()).sqrt())
    exact = float(A.trace() + B.trace()) - 2 * trace
    real, fake = cloud(60_000, 2, 3) @ factors[0], cloud(60_000, 2, 4) @ factors[1]
    assert exact > 0.3
    assert frechet_distance(real, fake) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("count", [10, 200])  # fewer and more than the 32 dimensions
def test_frechet_distance_of_a_moved_set_is_the_squared_way(count: int) -> None:
    real = cloud(count, 32, 5)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(real, real + 0.5) == pytest.approx(32 * 0.25, abs=1e-4)


def test_frechet_distance_falls_with_the_number_of_images() -> None:
    few, many = (frechet_distance(cloud(count, 32, 6), cloud(count, 32, 7)) for count in (40, 4000))
    assert few > 5 * many > 0


def test_kernel_distance_of_two_points_is_exact() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    # k(x, y) = (x.y / 2 + 1)^3, so k(one, one) + k(other, other) - 2 k(one, other)
    mean, deviation = kernel_distance(one.repeat(8, 1), other.repeat(6, 1))
    assert mean == pytest.approx(1.5**3 + 3**3 - 2)
    assert deviation == pytest.approx(0, abs=1e-5)


def test_kernel_distance_is_unbiased_and_grows_with_the_way() -> None:
    real = cloud(400, 16, 1)
    same, spread = kernel_distance(real, cloud(300, 16, 2))
    near, _ = kernel_distance(real, cloud(300, 16, 2) + 0.5)
    far, _ = kernel_distance(real, cloud(300, 16, 2) + 1)
    assert abs(same) < 2 * spread
    assert 5 * spread < near < far


def test_kernel_distance_leaves_the_global_generator_alone() -> None:
    real, fake = cloud(50, 8, 1), cloud(50, 8, 2)
    torch.manual_seed(1)
    first = kernel_distance(real, fake)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert kernel_distance(real, fake) == first


def test_precision_recall_density_coverage_by_hand() -> None:
    real, fake = line(0, 1, 2, 3), line(1.5, 1.6, 1.7, 10)
    # Real balls have radius 1, so the outlier at 10 is outside all; its own ball, of 8.3, reaches 2 and 3.
    assert precision_recall(real, fake, neighbours=1) == (3 / 4, 2 / 4)
    # The balls around 1 and 2 hold three images each, those around 0 and 3 none.
    assert density_coverage(real, fake, neighbours=1) == (6 / 4, 2 / 4)


def test_identical_sets_are_perfect() -> None:
    real = 100 + cloud(60, 64, 1)  # far from the origin, where float32 distances lose their digits
    assert precision_recall(real, real) == (1, 1)
    density, coverage = density_coverage(real, real)
    assert density >= 1
    assert coverage == 1


def test_a_dropped_mode_costs_recall_and_coverage_but_not_precision() -> None:
    near, far = cloud(200, 2, 1), cloud(200, 2, 2) + 50
    real = torch.cat([near, far])
    whole = torch.cat([cloud(200, 2, 3), cloud(200, 2, 4) + 50])
    dropped = cloud(400, 2, 5)
    precision, recall = precision_recall(real, whole)
    dropped_precision, dropped_recall = precision_recall(real, dropped)
    assert dropped_precision == pytest.approx(precision, abs=0.05)
    assert recall > 0.9
    assert dropped_recall < 0.55
    assert density_coverage(real, whole)[1] > 0.9
    assert density_coverage(real, dropped)[1] < 0.55


def test_order_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = cloud(30, 6, 1), cloud(25, 6, 2) + 0.3
    shuffled = fake.flip(0)
    before = precision_recall(real, fake), density_coverage(real, fake), frechet_distance(real, fake)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    after = precision_recall(real, shuffled), density_coverage(real, shuffled), frechet_distance(real, shuffled)
    assert after[:2] == before[:2]
    assert after[2] == pytest.approx(before[2], rel=1e-4)


def test_match_at_1_finds_planted_features() -> None:
    gallery = torch.eye(4)
    shown = [("rocket", "flat"), ("rocket", "bold"), ("crab", "flat"), ("crab", "bold")]
    # lengths differ, for only directions count
    generated = torch.stack([5 * gallery[0] + gallery[2], 0.1 * gallery[3], gallery[2], 9 * gallery[1]])
    wanted = [("rocket", "flat"), ("crab", "flat"), ("rocket", "flat"), ("rocket", "bold")]
    assert match_at_1(generated, gallery, wanted, shown) == (3 / 4, 2 / 4)


def test_pair_distance_is_the_mean_over_pairs_then_groups() -> None:
    features = 3 * cloud(2 * 4, 6, 1).reshape(2, 4, 6)
    expected = []
    for group in features:
        pairs = [(one, other) for one in range(4) for other in range(one)]
        expected += [1 - float(torch.cosine_similarity(group[one], group[other], dim=0)) for one, other in pairs]
    assert pair_distance(features) == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert pair_distance(features[:, :1].repeat(1, 5, 1)) == pytest.approx(0, abs=1e-6)
    assert pair_distance(torch.eye(4)[None]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("metric", "count"), [(frechet_distance, 1), (kernel_distance, 3), (precision_recall, 3), (density_coverage, 5)]
)
def test_too_few_images_are_refused(metric: object, count: int) -> None:
    assert callable(metric)
    with pytest.raises(FewstepError, match=f"{count} images are too few to compare: give at least {count + 1}"):
        metric(cloud(20, 2, 1), cloud(count, 2, 2))
