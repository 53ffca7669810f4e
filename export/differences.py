"""Distances between what an engine computes and what torch does, and how large each precision may make them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.engines import TEXT_ENCODER, TRAJECTORY
from ..runtime.errors import require

END_TO_END = "end_to_end"
"""The part that is both graphs in turn; the others are each graph alone, given what torch gives it."""

Measures = Mapping[str, float]
"""Distances of one image, by name.

- `largest`, `rms`: the largest difference and the root mean square of all, relative to the largest magnitude and the
  root mean square of torch's numbers; of pixels, relative to 255.
- `psnr`, `ssim`, `off`: of pictures, the peak signal-to-noise ratio in dB, the structural similarity (1 when equal),
  and the share of values that are more than 2/255 off.
"""

VISIBLE = 2
"""Units of 1/255. Rounding moves a value by one, and a sum in another order some of those by another."""
EQUAL_PSNR = 200.0
"""In dB, what equal pictures get: infinity is no JSON."""
_HIGHER_IS_NEARER = ("psnr", "ssim")
_TINY = float(np.finfo(np.float32).tiny)

_INT8: Mapping[str, Measures] = {
    TEXT_ENCODER: {"largest": 2e-4, "rms": 1e-4},
    TRAJECTORY: {"rms": 0.04},
    END_TO_END: {"psnr": 28.0, "ssim": 0.98, "off": 0.3},
}
# Measured: the worst of twelve images of the shipped student, at one step and, with its rounding fed back into the
# network, at four.
TOLERANCES: Mapping[str, Mapping[str, Measures]] = {
    # Sums in another order: 1.3e-5, 5e-6; 1/255, 9e-5; 84 dB, 1.0, 0 in ONNX Runtime and OpenVINO. Ten times that, for
    # other processors; and 60 dB, so that a dozen of the 192 values of the smallest pictures may round the other way.
    "fp32": {
        TEXT_ENCODER: {"largest": 2e-4, "rms": 1e-4},
        TRAJECTORY: {"largest": 2 / 255, "rms": 1e-3},
        END_TO_END: {"psnr": 60.0, "ssim": 0.999, "off": 0.0},
    },
    # Eleven bits: 5e-3, 2e-3; 2e-3; 55 dB, 0.9995, 0.007 in torch. Three to four times that.
    "fp16": {
        TEXT_ENCODER: {"largest": 0.02, "rms": 0.01},
        TRAJECTORY: {"rms": 0.006},
        END_TO_END: {"psnr": 44.0, "ssim": 0.998, "off": 0.03},
    },
    # Eight bits: 0.03, 0.012; 0.019; 34.6 dB, 0.992, 0.09 in OpenVINO and AOTInductor alike, of one image in twelve,
    # the others having 46 dB and more; a quarter more than that one, in which linear attention jumps (see README.md).
    # An edge that moves by half a pixel makes one large difference, so that the largest of all pixels says nothing.
    "bf16": {
        TEXT_ENCODER: {"largest": 0.1, "rms": 0.04},
        TRAJECTORY: {"rms": 0.024},
        END_TO_END: {"psnr": 33.0, "ssim": 0.99, "off": 0.25},
    },
    # A trajectory in eight bits behind a text encoder in float32: 0.019; 34.5 dB, 0.992, 0.14 in ONNX Runtime. Twice
    # that, which the eye does see: a score decides.
    "int8": _INT8,
    # The same with activations scaled beforehand. The shipped student does not pass: 0.041; 27.8 dB, 0.955, 0.46.
    "int8static": _INT8,
    # Eight bits for weights alone, where int8 rounds both operands: half of its squared error, 3 dB. All that is not a
    # weight may be in bfloat16. Measured at one step: 0.018; 34.9 dB, 0.992, 0.05 in ONNX Runtime, and 0.02; 34.3 dB,
    # 0.990, 0.13 in OpenVINO.
    "w8": {
        TEXT_ENCODER: {"largest": 0.1, "rms": 0.04},
        TRAJECTORY: {"rms": 0.028},
        END_TO_END: {"psnr": 31.0, "ssim": 0.985, "off": 0.25},
    },
    # Four bits for weights: 0.034; 29.6 dB, 0.972, 0.39 at one step in both. Twice that, which the eye does see.
    "w4": {
        TEXT_ENCODER: {"largest": 0.1, "rms": 0.04},
        TRAJECTORY: {"rms": 0.07},
        END_TO_END: {"psnr": 23.5, "ssim": 0.94, "off": 0.5},
    },
    # Three bits of fraction, no GPU to measure on: what int8 may have, and fp16 between its products.
    "fp8": {
        TEXT_ENCODER: {"largest": 0.02, "rms": 0.01},
        TRAJECTORY: {"rms": 0.04},
        END_TO_END: {"psnr": 28.0, "ssim": 0.98, "off": 0.3},
    },
}
"""What an image may have at worst, by precision and part."""


MOST_OFF = 0.65
"""Of any picture's values, whatever the precision."""


def part_tolerances(precision: str, parts: Sequence[str]) -> dict[str, Measures]:
    """What an image may have at worst in an export of these parts.

    Text encoders as in a fused export. What is measured of a network or a decoder is relative to its own root mean
    square, about half of what white is to a picture: twice what a trajectory may have. So may more values be off, where
    pictures have no flat ground, as the shipped student's do: 0.41 in bf16 and eight bits, 0.52 in four.
    """
    fused = TOLERANCES[precision]
    network = {"rms": 2 * fused[TRAJECTORY]["rms"]}
    tolerances = {part: fused[TEXT_ENCODER] if part.startswith(TEXT_ENCODER) else network for part in parts}
    pictures = fused[END_TO_END]
    return {**tolerances, END_TO_END: {**pictures, "off": min(2 * pictures["off"], MOST_OFF)}}


def tensor_measures(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> list[Measures]:
    """`largest` and `rms` of each image, whose numbers lie along the first axis."""
    reference = expected.reshape(len(expected), -1).astype(np.float64)
    error = found.reshape(reference.shape) - reference
    return [
        {
            "largest": float(np.abs(wrong).max()) / max(float(np.abs(right).max()), _TINY),
            "rms": _rms(wrong) / max(_rms(right), _TINY),
        }
        for wrong, right in zip(error, reference, strict=True)
    ]


def pixel_measures(found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> list[Measures]:
    """`largest` and `rms` of each image, from pixels (B, H, W, 3)."""
    errors = (found.astype(np.float64) - expected) / 255
    return [{"largest": float(np.abs(error).max()), "rms": _rms(error)} for error in errors]


def image_measures(found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> list[Measures]:
    """`psnr`, `ssim` and `off` of each image, from pixels (B, H, W, 3).

    Raises:
        FewstepError: torchmetrics is not installed.
    """
    metrics = require("torchmetrics.functional.image", "onnx")
    measures: list[Measures] = []
    for position in range(len(expected)):  # one at a time: SSIM keeps fifteen copies of a picture
        one = slice(position, position + 1)
        pair = [torch.from_numpy(pixels[one]).permute(0, 3, 1, 2).double() for pixels in (found, expected)]
        off = np.abs(found[position].astype(int) - expected[position]) > VISIBLE
        measures.append(
            {
                "psnr": min(float(metrics.peak_signal_noise_ratio(*pair, data_range=255.0)), EQUAL_PSNR),
                "ssim": float(metrics.structural_similarity_index_measure(*pair, data_range=255.0)),
                "off": float(off.mean()),
            }
        )
    return measures


def beyond(found: Measures, tolerance: Measures) -> str:
    """Which measures exceed their tolerance, and by how much, as a clause; empty if none does. NaN always exceeds."""
    clauses = []
    for name, limit in tolerance.items():
        higher = name in _HIGHER_IS_NEARER
        if not (found[name] >= limit if higher else found[name] <= limit):
            bound = "at least" if higher else "at most"
            clauses.append(f"{name} {found[name]:.3g} where {bound} {limit:.3g} is allowed")
    return ", ".join(clauses)


def worst(measures: Sequence[Measures]) -> Measures:
    """Each measure at its worst; NaN if any is NaN."""
    return {
        name: float((np.min if name in _HIGHER_IS_NEARER else np.max)([each[name] for each in measures]))
        for name in measures[0]
    }


def _rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).mean()))
