"""Analytic teachers: data distributions whose `x_0`-prediction is known under every process."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.runtime.denoiser import Condition, levels
from fewstep.runtime.schedule import Flow, Schedule


@dataclass(frozen=True)
class Gaussian:
    """`x_0 ~ N(mean, variance)`; works on x (B, D).

    Args:
        mean: (D,).
        variance: of every coordinate, or the covariance matrix (D, D).
        schedule: the process of `x_t`.
    """

    mean: Tensor
    variance: float | Tensor = 0.5
    schedule: Schedule = field(default_factory=Flow)

    @property
    def covariance(self) -> Tensor:
        if isinstance(self.variance, Tensor):
            return self.variance
        return self.variance * torch.eye(len(self.mean), dtype=self.mean.dtype)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """`mean + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean)`, in the eigenbasis of C."""
        alpha, sigma = levels(self.schedule, t, x_t)
        variances, basis = torch.linalg.eigh(self.covariance)
        gain = alpha * variances / (alpha**2 * variances + sigma**2)
        return self.mean + ((x_t - alpha * self.mean) @ basis * gain) @ basis.T

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log density of `x_t ~ N(alpha mean, alpha^2 C + sigma^2 I)`."""
        alpha, sigma = levels(self.schedule, t, x_t)
        variances, basis = torch.linalg.eigh(self.covariance)
        return -((x_t - alpha * self.mean) @ basis / (alpha**2 * variances + sigma**2)) @ basis.T

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """The exact probability flow from t to s: every principal component keeps its number of standard deviations.

        Without s, to 0, where it is an exact one-step student.
        """
        end = torch.zeros_like(t) if s is None else s
        variances, basis = torch.linalg.eigh(self.covariance)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels(self.schedule, time, x_t) for time in (t, end))
        growth = ((alpha_s**2 * variances + sigma_s**2) / (alpha_t**2 * variances + sigma_t**2)).sqrt()
        return alpha_s * self.mean + ((x_t - alpha_t * self.mean) @ basis * growth) @ basis.T

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, D)."""
        variances, basis = torch.linalg.eigh(self.covariance)
        standard = torch.randn(count, len(self.mean), dtype=self.mean.dtype, generator=generator)
        return self.mean + (standard * variances.sqrt()) @ basis.T


@dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians; works on x (B, D).

    Args:
        means: (K, D).
        weights: (K,), adding up to 1.
        variances: of each component (K,), or of all.
        schedule: the process of `x_t`.
    """

    means: Tensor = field(default_factory=lambda: torch.tensor([[1.0, 0.6], [-1.0, 0.6], [0.0, -1.1]]))
    weights: Tensor = field(default_factory=lambda: torch.tensor([0.5, 0.3, 0.2]))
    variances: float | Tensor = 0.06
    schedule: Schedule = field(default_factory=Flow)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The components' posterior means, weighted by their responsibilities."""
        alpha, sigma = (value.unsqueeze(-1) for value in levels(self.schedule, t, x_t))  # against (B, K, D)
        variances = self._variances()[:, None]
        spread = alpha**2 * variances + sigma**2
        offset = x_t[:, None] - alpha * self.means
        log_likelihood = (-0.5 * (offset**2 / spread + spread.log())).sum(-1)
        responsibility = (self.weights.log() + log_likelihood).softmax(-1).unsqueeze(-1)
        return (responsibility * (self.means + alpha * variances / spread * offset)).sum(1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, D)."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        standard = torch.randn(count, self.means.shape[1], dtype=self.means.dtype, generator=generator)
        return self.means[component] + self._variances()[component, None].sqrt() * standard

    def _variances(self) -> Tensor:
        return torch.as_tensor(self.variances, dtype=self.means.dtype).expand(len(self.means))
