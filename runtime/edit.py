"""Image-to-image: where the trajectory starts, and what from (Meng et al. 2021, arXiv 2108.01073, section 3)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from .errors import FewstepError

DEFAULT_STRENGTH = 0.6


def first_step(steps: int, strength: float) -> int:
    """How many steps of a trajectory are left out, for it to start at `strength` of its length.

    Args:
        steps: of the whole trajectory.
        strength: in (0, 1): the larger, the less of the picture stays.

    Raises:
        FewstepError: the strength lies outside, or leaves no step.
    """
    if not 0 < strength < 1:
        raise FewstepError(f"a strength of {strength:g} is not possible: give one between 0 and 1")
    if steps == 1:
        raise FewstepError("image-to-image starts between two steps: take a model of two or more, such as the teacher")
    taken = int(strength * steps + 1e-9)
    if not taken:
        raise FewstepError(f"strength {strength:g} of {steps} steps is less than one: give at least {1 / steps:.2g}")
    return steps - taken


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """A picture as a model of this size can take it: upright, opaque, scaled, and cropped around its centre."""
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def stack(images: Sequence[Image.Image], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Pictures as pixels (B, H, W, 3)."""
    return np.stack([np.asarray(fit(image, width, height)) for image in images])
