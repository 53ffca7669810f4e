"""How a set of latents differs from the real ones: mean, deviation, Fréchet distance and diversity.

Latents are (N, C, ...): every position of every latent is one sample of C channels. All differences are in units of the
real latents' deviation, so that one threshold suits every autoencoder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentStatistics:
    """What is kept of a set of latents.

    Args:
        mean: (C,).
        covariance: (C, C).
        diversity: mean distance between two of the latents.
    """

    mean: Tensor
    covariance: Tensor
    diversity: float


@dataclass(frozen=True)
class Comparison:
    """A set of samples against real latents.

    Args:
        mean_drift: difference of the means in deviations, root mean square over the channels; 0 is ideal.
        deviation: of the samples over that of the real latents, root mean square over the channels; 1 is ideal.
        distance: squared Fréchet distance of the channels' Gaussians (arXiv 1706.08500, eq. 6) over the real latents'
            variance; 0 is ideal, and samples that are all the real mean have 1.
        diversity: of the samples over that of the real latents; 1 is ideal.
    """

    mean_drift: float
    deviation: float
    distance: float
    diversity: float


def latent_statistics(latents: Tensor) -> LatentStatistics:
    """Statistics, in float64 on the CPU, of finite latents (N, C, ...) with N at least 2."""
    latents = latents.detach().cpu().double()
    channels = latents.flatten(2).movedim(1, -1) if latents.ndim > 2 else latents
    channels = channels.reshape(-1, latents.shape[1])
    diversity = nn.functional.pdist(latents.flatten(1)).mean()
    return LatentStatistics(channels.mean(0), channels.T.cov().reshape(2 * channels.shape[1:]), float(diversity))


def compare(samples: LatentStatistics, real: LatentStatistics) -> Comparison:
    """Measure samples in units of the real latents' deviation."""
    deviation = real.covariance.diagonal().sqrt()
    deviation = deviation.clamp_min(0.1 * float(_root_mean_square(deviation)))  # a dead channel must not outweigh all
    scale = torch.outer(deviation, deviation)
    drift = (samples.mean - real.mean) / deviation
    return Comparison(
        mean_drift=float(_root_mean_square(drift)),
        deviation=float((samples.covariance / scale).diagonal().mean().sqrt()),
        distance=float(_squared_frechet(drift, samples.covariance / scale, real.covariance / scale)) / len(drift),
        diversity=samples.diversity / max(real.diversity, 1e-12),  # of one picture alone there is none
    )


def _squared_frechet(difference: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`|m|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)`."""
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross: Tensor = torch.linalg.eigvalsh(root @ right @ root).clamp_min(0).sqrt().sum()
    return difference @ difference + left.trace() + right.trace() - 2 * cross


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
