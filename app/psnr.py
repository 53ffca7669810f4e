"""How near two pictures are."""

import math
from typing import Any


def psnr(pixels: Any, wanted: Any) -> float:
    """Peak signal-to-noise ratio of two arrays of uint8 pixels in dB; infinite where they are equal."""
    import numpy as np

    error = float(np.mean((pixels.astype(np.float64) - wanted) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
