"""The distribution-matching gradient: what moves a student's samples in DMD (arXiv 2311.18828) and its descendants."""

import torch
from torch import Tensor

from .dispatch import runs_triton


@torch.no_grad()
def distribution_matching_gradient(x: Tensor, mu_fake: Tensor, mu_real: Tensor) -> Tensor:
    """`(mu_fake - mu_real) / mean_chw |x - mu_real|`, the mean taken per sample (arXiv 2311.18828, eq. 7 and 8).

    Args:
        x: (B, ...) student samples.
        mu_fake: (B, ...) `x_0`-prediction of the fake-score network at the noised sample.
        mu_real: (B, ...) the teacher's.

    Returns:
        (B, ...) in the dtype of `x`, outside autograd; entries that are not finite become 0.
    """
    if runs_triton(x, mu_fake, mu_real):
        from .distribution_matching_triton import launch

        return launch(x, mu_fake, mu_real)
    return distribution_matching_gradient_reference(x, mu_fake, mu_real)


def distribution_matching_gradient_reference(x: Tensor, mu_fake: Tensor, mu_real: Tensor) -> Tensor:
    """The same in plain torch; half precision is computed in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    offset = x.to(wide) - mu_real.to(wide)
    scale = offset.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    gradient = ((mu_fake.to(wide) - mu_real.to(wide)) / scale).to(x.dtype)
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
