"""Tiny captioned data, and the feature network loaded once."""

import hashlib

import pytest
import torch

from fewstep.training.data.packed import CaptionedImages
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.reference import Reference, load_reference

SIDE = 16
SHAPES, STYLES = 10, ("outline", "solid")


@pytest.fixture(scope="session")
def network() -> FeatureNetwork:
    return FeatureNetwork()


@pytest.fixture(scope="session")
def data() -> CaptionedImages:
    """Ten random blocks of colour on white, each in two styles."""
    generator = torch.Generator().manual_seed(1)
    images = torch.full((SHAPES * len(STYLES), 3, SIDE, SIDE), 255, dtype=torch.uint8)
    for shape in range(SHAPES):
        colours = torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8)
        block = colours.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
        images[2 * shape, :, 2:14, 2:14] = block
        images[2 * shape, :, 4:12, 4:12] = 255
        images[2 * shape + 1, :, 2:14, 2:14] = block
    labels = tuple(f"shape {shape}" for shape in range(SHAPES) for _ in STYLES)
    styles = STYLES * SHAPES
    captions = tuple((f"{label}, {style}", f"a {label}") for label, style in zip(labels, styles, strict=True))
    identity = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return CaptionedImages(images, captions, labels, styles, identity)


@pytest.fixture(scope="session")
def reference(data: CaptionedImages, network: FeatureNetwork, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(data, network, tmp_path_factory.mktemp("reference") / "features.safetensors")
