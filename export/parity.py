"""Parity: an engine's images against torch's in float32, from the same prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice

import numpy as np
import numpy.typing as npt

from ..runtime.engines import Arrays, Engines
from ..runtime.errors import FewstepError
from ..runtime.noise import gaussian_noise
from ..runtime.text import Tokenizer

PROMPTS = ("a red apple", "smiling face with sunglasses", "house and garden on a rainy night, seen from far away", "x")
BATCHES = (1, 3, 8)
"""Batches of one, and of sizes that do and do not fill vector registers."""


@dataclass(frozen=True)
class Difference:
    """How far an image is from another, in units of 1/255.

    Args:
        maximum: largest difference of a value.
        mean: mean absolute difference.
        psnr: peak signal-to-noise ratio in dB.
    """

    maximum: float
    mean: float
    psnr: float


TOLERANCES = {
    # Summation order alone: measured at most 0.001, so that less than one value in a thousand rounds to another byte.
    "fp32": Difference(maximum=1.0, mean=0.05, psnr=60.0),
    # Measured on trained weights: mean 0.59 and 46 dB for one step, 0.63 and 41 dB for four, which feed their rounding
    # back into the network. An edge that moves by half a pixel makes a large maximum (31 there): mean and PSNR decide.
    "bf16": Difference(maximum=255.0, mean=1.0, psnr=35.0),
}
"""What a precision may cost, on the worst image."""


@dataclass(frozen=True)
class ParityReport:
    """The worst of several images.

    Args:
        images: how many were compared.
        worst: largest maximum, largest mean and lowest PSNR of an image.
        tolerance: what they had to keep to.
    """

    images: int
    worst: Difference
    tolerance: Difference


def check_parity(reference: Engines, engines: Engines, tokenize: Tokenizer, precision: str) -> ParityReport:
    """Compare images of several prompts, seeds and batch sizes.

    Args:
        reference: torch, in float32.
        engines: the exported graphs.
        tokenize: makes prompts into the text encoders' inputs.
        precision: a key of `TOLERANCES`.

    Raises:
        FewstepError: an image differs by more than the tolerance; the sentence names it.
    """
    tolerance = TOLERANCES[precision]
    differences = []
    first_seed = 0
    for batch in BATCHES:
        prompts, seeds = list(islice(cycle(PROMPTS), batch)), list(islice(count(first_seed), batch))
        tokens, noise = make_inputs(tokenize, reference, prompts, seeds)
        for image, expected, prompt, seed in zip(
            engines(tokens, noise), reference(tokens, noise), prompts, seeds, strict=True
        ):
            found = difference(image, expected)
            if not within(found, tolerance):
                case = f"{prompt!r} with seed {seed} in a batch of {batch}"
                raise FewstepError(_sentence(engines.name, precision, case, found, tolerance))
            differences.append(found)
        first_seed += batch
    worst = Difference(
        max(found.maximum for found in differences),
        max(found.mean for found in differences),
        min(found.psnr for found in differences),
    )
    return ParityReport(len(differences), worst, tolerance)


def make_inputs(
    tokenize: Tokenizer, engines: Engines, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Arrays, npt.NDArray[np.float32]]:
    """Token ids of the prompts and noise of the seeds (B, draws, C, h, w)."""
    tokens = {name: value.numpy() for name, value in tokenize(prompts).items()}
    draws = [gaussian_noise(seeds, step, engines.sample_shape) for step in range(engines.draws)]
    return tokens, np.stack(draws, axis=1)


def difference(image: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> Difference:
    """Compare two images in [0, 1]."""
    error = np.abs(image.astype(np.float64) - expected)
    # A floor on the error keeps equal images at a finite 200 dB.
    psnr = -10 * np.log10(max(float((error**2).mean()), 1e-20))
    return Difference(255 * float(error.max()), 255 * float(error.mean()), float(psnr))


def within(found: Difference, tolerance: Difference) -> bool:
    """Whether all three measures hold; NaN never does."""
    return found.maximum <= tolerance.maximum and found.mean <= tolerance.mean and found.psnr >= tolerance.psnr


def _sentence(engine: str, precision: str, case: str, found: Difference, tolerance: Difference) -> str:
    remedy = "export it with --precision fp32" if precision != "fp32" else "nothing was exported"
    return (
        f"{engine} in {precision} does not draw what torch draws: for {case} they differ by {found.mean:.3g} of 255 in "
        f"the mean and {found.maximum:.3g} at most (PSNR {found.psnr:.1f} dB), and {tolerance.mean:g}, "
        f"{tolerance.maximum:g} and {tolerance.psnr:g} dB are allowed: {remedy}"
    )
