"""Conversions between what networks predict: noise `eps`, velocity `v`, clean sample `x_0`, flow velocity.

`x_t = alpha * x_0 + sigma * eps`. `alpha` and `sigma` broadcast against `x_t`; every function returns the shape of
`x_t`. The formulas hold for any process, not only for variance-preserving ones.
"""

from collections.abc import Callable

from torch import Tensor


def epsilon_to_sample(epsilon: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`x_0 = (x_t - sigma eps) / alpha`; undefined where `alpha = 0`."""
    return (x_t - sigma * epsilon) / alpha


def sample_to_epsilon(sample: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`eps = (x_t - alpha x_0) / sigma`; undefined where `sigma = 0`."""
    return (x_t - alpha * sample) / sigma


def v_to_sample(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Invert `v = alpha eps - sigma x_0` (Salimans and Ho 2022, arXiv 2202.00512, appendix D)."""
    return (alpha * x_t - sigma * v) / (alpha**2 + sigma**2)


def sample_to_v(sample: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`v = alpha eps - sigma x_0`; undefined where `sigma = 0`."""
    return (alpha * x_t - (alpha**2 + sigma**2) * sample) / sigma


def flow_to_sample(flow: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Invert the flow velocity `eps - x_0` (arXiv 2209.03003)."""
    return (x_t - sigma * flow) / (alpha + sigma)


def sample_to_flow(sample: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`eps - x_0`; undefined where `sigma = 0`."""
    return (x_t - (alpha + sigma) * sample) / sigma


def edm_to_sample(output: Tensor, x_t: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's preconditioning `c_skip x_t + c_out F` (arXiv 2206.00364, eq. 7 and table 1)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total * x_t + sigma * sigma_data * total.rsqrt() * output


def sample_to_edm(sample: Tensor, x_t: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The network output `F` that `edm_to_sample` turns into `sample`; undefined where `sigma = 0`."""
    total = sigma**2 + sigma_data**2
    return (sample - sigma_data**2 / total * x_t) / (sigma * sigma_data * total.rsqrt())


def _sample_to_sample(sample: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return sample


Conversion = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TO_SAMPLE: dict[str, Conversion] = {
    "epsilon": epsilon_to_sample,
    "v_prediction": v_to_sample,
    "sample": _sample_to_sample,
    "flow_prediction": flow_to_sample,
}
"""From a network's output to `x_0`, by diffusers' name of the prediction type."""

FROM_SAMPLE: dict[str, Conversion] = {
    "epsilon": sample_to_epsilon,
    "v_prediction": sample_to_v,
    "sample": _sample_to_sample,
    "flow_prediction": sample_to_flow,
}
"""The inverse of `TO_SAMPLE`."""
