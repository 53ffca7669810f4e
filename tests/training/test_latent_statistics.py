"""Statistics of latents: known distances of Gaussians, the data's units, what diversity sees and deviation does not."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.training.latent_statistics import Comparison, LatentStatistics, compare, latent_statistics


def gaussian(mean: list[float], covariance: list[list[float]]) -> LatentStatistics:
    return LatentStatistics(torch.tensor(mean).double(), torch.tensor(covariance).double(), 1.0)


def between(samples: Tensor, real: Tensor) -> Comparison:
    return compare(latent_statistics(samples), latent_statistics(real))


def test_a_set_equals_itself() -> None:
    latents = torch.randn(20, 3, 4, 5)
    same = between(latents, latents)
    assert (same.mean_drift, same.deviation, same.diversity) == (0, 1, 1)
    assert same.distance == pytest.approx(0, abs=1e-12)


def test_distances_of_gaussians_in_the_datas_deviations() -> None:
    real = gaussian([1, 0], [[4, 0], [0, 9]])
    moved = compare(gaussian([3, 0], [[4, 0], [0, 9]]), real)
    assert moved.mean_drift == pytest.approx(math.sqrt(1 / 2))  # one deviation in one of two channels
    assert moved.distance == pytest.approx(1 / 2)
    wider = compare(gaussian([1, 0], [[16, 0], [0, 36]]), real)
    assert (wider.mean_drift, wider.deviation) == (0, pytest.approx(2))
    assert wider.distance == pytest.approx(1)
    blank = compare(gaussian([1, 0], [[0, 0], [0, 0]]), real)
    assert (blank.deviation, blank.distance) == (0, pytest.approx(1))
    # Covariances with the same eigenvectors: sum of (sqrt a - sqrt b)^2 over eigenvalues 1.8, 0.2 and 0.2, 1.8.
    flipped = compare(gaussian([0, 0], [[1, -0.8], [-0.8, 1]]), gaussian([0, 0], [[1, 0.8], [0.8, 1]]))
    assert flipped.distance == pytest.approx((math.sqrt(1.8) - math.sqrt(0.2)) ** 2)
    assert (flipped.mean_drift, flipped.deviation) == (0, pytest.approx(1))


def test_no_scale_or_shift_of_the_channels_matters() -> None:
    """So one threshold suits every autoencoder."""
    real, samples = torch.randn(50, 3, 4, 4), 1.5 * torch.randn(50, 3, 4, 4) + 0.3
    scale, shift = torch.tensor([0.5, 2.0, 3.0]).reshape(3, 1, 1), torch.tensor([5.0, 0.0, -10.0]).reshape(3, 1, 1)
    plain, other = between(samples, real), between(samples * scale + shift, real * scale + shift)
    assert other.mean_drift == pytest.approx(plain.mean_drift, rel=1e-4)
    assert other.deviation == pytest.approx(plain.deviation, rel=1e-4)
    assert other.distance == pytest.approx(plain.distance, rel=1e-4)


def test_one_picture_many_times_has_the_deviation_but_not_the_diversity() -> None:
    latents = torch.randn(30, 2, 16, 16)
    repeated = between(latents[:1].expand_as(latents), latents)
    assert repeated.diversity == 0
    assert repeated.deviation == pytest.approx(1, abs=0.1)


def test_a_dead_channel_does_not_drown_the_others() -> None:
    real = torch.randn(100, 2)
    real[:, 1] = 0
    assert between(real + 0.01, real).mean_drift < 0.2


@pytest.mark.parametrize("shape", [(8, 1), (8, 2), (8, 1, 3, 3)])
def test_any_number_of_channels_and_positions(shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape)
    values = latents.double().transpose(0, 1).flatten(1)
    found = latent_statistics(latents)
    torch.testing.assert_close(found.mean, values.mean(1))
    torch.testing.assert_close(found.covariance.diagonal(), values.var(1))
    pairs = [(latents[i] - latents[j]).norm() for i in range(8) for j in range(i)]
    assert found.diversity == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
